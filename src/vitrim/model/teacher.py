"""The teacher of a fine-tuning: any network of timm, with its own weights and its own images."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ParamSpec, TypeVar, get_args

import timm
from torch import nn

from vitrim.data import ImageSpec
from vitrim.errors import ConfigError, is_count, is_positive, is_rate, require
from vitrim.model.checkpoint import check_path, fingerprint_of, read_checkpoint
from vitrim.model.source import architecture, check_name, check_pixels, image_spec, takes_any_size
from vitrim.network.skeleton import shared_skeleton
from vitrim.plan import Plan, PlanError
from vitrim.store import assign
from vitrim.trainer.distillation import Distillation, Kind

P = ParamSpec("P")
R = TypeVar("R")
_KEY = re.compile(r"\bmodel\.(?=(?:checkpoint|sha256|num_classes)\b)")
ALPHA: Mapping[Kind, float] = {"hard": 0.5, "soft": 0.1}
TEMPERATURE = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """A network of timm from whose outputs fine-tuning learns (conf/teacher/none.yaml).

    Args:
        name: timm's name of the network.
        checkpoint: a file or folder of its weights; None: timm's are downloaded.
        sha256: the expected SHA-256 of the checkpoint.
        num_classes: outputs, where a checkpoint has others than timm's; None: timm's number.
        image_size: side of its images in pixels; None: timm's size.
        mean: per channel, for the normalisation of its images; None: timm's values.
        std: per channel, as `mean`.
        args: further arguments of timm.create_model.
        distillation: hard or soft.
        alpha: weight of the teacher in the loss; None: DeiT's.
        temperature: of soft distillation; None: DeiT's.
    """

    name: str
    checkpoint: str | None
    sha256: str | None
    num_classes: int | None
    image_size: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    args: Mapping[str, object]
    distillation: Kind
    alpha: float | None
    temperature: float | None

    def __post_init__(self) -> None:
        check_name("teacher.name", self.name)
        soft, loads = self.distillation == "soft", self.checkpoint is not None
        size, alpha = self.image_size, self.alpha
        require(
            "teacher",
            self,
            ("distillation", self.distillation in get_args(Kind), "hard or soft"),
            ("alpha", alpha is None or (is_rate(alpha) and 0 < alpha <= 1), "null or up to 1"),
            (
                "temperature",
                self.temperature is None or (soft and is_positive(self.temperature)),
                "null, or with distillation=soft a number above 0",
            ),
            ("image_size", size is None or is_count(size), "null or a number of pixels"),
            ("sha256", self.sha256 is None or loads, "null without teacher.checkpoint"),
            (
                "num_classes",
                self.num_classes is None or (loads and is_count(self.num_classes)),
                "null, or with teacher.checkpoint its number of outputs",
            ),
        )
        if self.checkpoint is not None:
            with_own_key(check_path, self.checkpoint)
        check_pixels("teacher", self.mean, self.std, self.spec().channels)

    @property
    def n_classes(self) -> int:
        """Outputs of its classifier."""
        return int(self.skeleton().num_classes)  # type: ignore[arg-type]

    def skeleton(self) -> nn.Module:
        """Return the network without weights, built once: callers must not modify it.

        Raises:
            ConfigError: timm cannot make it of these arguments, or they would load weights.
        """
        try:
            return shared_skeleton(self._description())
        except PlanError as error:
            raise ConfigError(f"teacher.name={self.name}: {error}") from None

    def spec(self) -> ImageSpec:
        """Return how it expects its images."""
        sides = None if self.image_size is None else (self.image_size, self.image_size)
        return image_spec(self.skeleton(), self.args, sides, self.mean, self.std)

    def fingerprint(self) -> str | None:
        """Return the SHA-256 of the checkpoint, checked against `sha256`.

        Raises:
            ConfigError: there is no such file, or its SHA-256 is not the expected one.
        """
        if self.checkpoint is None:
            return None
        return with_own_key(fingerprint_of, self.checkpoint, self.sha256)

    def build(self, images: ImageSpec) -> Distillation:
        """Return the teacher with its weights, for images that are prepared like this.

        Raises:
            ConfigError: the weights cannot be downloaded, do not fit, or are damaged.
        """
        alpha = ALPHA[self.distillation] if self.alpha is None else self.alpha
        return Distillation(
            teacher=self._network().requires_grad_(False).eval(),
            kind=self.distillation,
            alpha=alpha,
            temperature=TEMPERATURE if self.temperature is None else self.temperature,
            images=images,
            expected=self.spec(),
            settings={**asdict(self), "checkpoint": self.fingerprint()},
        )

    def _network(self) -> nn.Module:
        if self.checkpoint is not None:
            model, skeleton = self._description(), copy.deepcopy(self.skeleton())
            state = with_own_key(
                read_checkpoint, self.checkpoint, model, skeleton, reset_head=False
            )
            return assign(skeleton, state, Plan(model=model, edits=()))
        try:
            pretrained: nn.Module = timm.create_model(
                self.name, pretrained=True, **self._arguments()
            )
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"teacher.name={self.name}: could not download its weights ({error}); "
                "teacher.checkpoint=FILE.safetensors loads a local copy"
            ) from None
        return pretrained

    def _description(self) -> dict[str, object]:
        """Return `name`, without the tag of timm's weights, and `args` of timm.create_model."""
        return {"name": architecture(self.name), "args": self._arguments()}

    def _arguments(self) -> dict[str, object]:
        arguments = dict(self.args)
        if self.num_classes is not None:
            arguments["num_classes"] = self.num_classes
        if self.image_size is not None and not takes_any_size(self.name):
            arguments["img_size"] = self.image_size
        return arguments


def with_own_key(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function of checkpoints; its errors name the keys of the teacher."""
    try:
        return function(*args, **kwargs)
    except ConfigError as error:
        raise ConfigError(_KEY.sub("teacher.", str(error))) from None

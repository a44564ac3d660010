"""The teacher of a fine-tuning: any network of timm, with its own weights and its own images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import ParamSpec, TypeVar, get_args

import timm
from timm.data import resolve_model_data_config
from torch import nn

from vitrim.data import ImageSpec
from vitrim.errors import ConfigError, is_count, is_positive, is_rate, require
from vitrim.model.checkpoint import check_path, fingerprint_of, read_checkpoint
from vitrim.model.source import takes_any_size
from vitrim.network.skeleton import on_meta
from vitrim.trainer.distillation import Distillation, Kind

P = ParamSpec("P")
R = TypeVar("R")
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
        name = str(self.name)
        if not timm.is_model(name.split(".")[0]):
            similar = get_close_matches(name, timm.list_models(), n=5, cutoff=0.3)
            raise ConfigError(
                f"teacher.name={name}: timm {timm.__version__} has no such network; similar "
                f"names: {', '.join(similar)}"
            )
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
        self.skeleton()
        _check_pixels(self)

    @property
    def n_classes(self) -> int:
        """Outputs of its classifier."""
        return int(self.skeleton().num_classes)  # type: ignore[arg-type]

    def skeleton(self) -> nn.Module:
        """Return the network without weights, on the meta device.

        Raises:
            ConfigError: timm cannot make it of these arguments.
        """
        try:
            with on_meta():
                net: nn.Module = timm.create_model(self.name.split(".")[0], **self._arguments())
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"teacher.name={self.name}: {error}") from None
        return net

    def spec(self) -> ImageSpec:
        """Return how it expects its images."""
        config = resolve_model_data_config(self.skeleton())
        channels, height, width = config["input_size"]
        in_chans = self.args.get("in_chans")
        size = (height, width) if self.image_size is None else (self.image_size,) * 2
        return ImageSpec(
            channels=in_chans if isinstance(in_chans, int) else channels,
            size=size,
            mean=config["mean"] if self.mean is None else self.mean,
            std=config["std"] if self.std is None else self.std,
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
        )

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
        arguments = self._arguments()
        if self.checkpoint is not None:
            model = {"name": self.name.split(".")[0], "args": arguments}
            state = with_own_key(
                read_checkpoint, self.checkpoint, model, self.skeleton(), reset_head=False
            )
            net: nn.Module = timm.create_model(self.name.split(".")[0], **arguments)
            net.load_state_dict(state)
            return net
        try:
            pretrained: nn.Module = timm.create_model(self.name, pretrained=True, **arguments)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"teacher.name={self.name}: could not download its weights ({error}); "
                "teacher.checkpoint=FILE.safetensors loads a local copy"
            ) from None
        return pretrained

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
        raise ConfigError(str(error).replace("model.", "teacher.")) from None


def _check_pixels(teacher: Teacher) -> None:
    """Refuse a normalisation that does not have a number for each channel."""
    channels = teacher.spec().channels
    for name, values, least in (("mean", teacher.mean, -math.inf), ("std", teacher.std, 0.0)):
        if values is None:
            continue
        numbers = all(type(value) in (int, float) and least < value < math.inf for value in values)
        if len(values) != channels or not numbers:
            raise ConfigError(f"teacher.{name}={values}: expected {channels} numbers, or null")

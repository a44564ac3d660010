"""A network of timm: how it is built, where its weights come from, what images it expects."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import timm
from timm.data import resolve_model_data_config
from timm.layers import HybridEmbed, PatchEmbed
from torch import nn

from vitrim.data import ImageSpec
from vitrim.errors import ConfigError, is_count
from vitrim.model.checkpoint import check_path, fingerprint_of, read_checkpoint
from vitrim.network import structure
from vitrim.network.skeleton import shared_skeleton
from vitrim.plan import Plan, PlanError
from vitrim.store import assign
from vitrim.trainer.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Timm:
    """A dense network of timm; its weights come from timm's hub, a file, or training.

    Args:
        name: timm's name of the network.
        pretrained: whether to download timm's weights.
        checkpoint: a file of weights, or a folder of a run, of timm or of transformers
            (`vitrim.model.reading`, `vitrim.model.layout`); its weights are used in float32.
        weights: which weights of a checkpoint that holds several: model, ema, or the name of a
            state dict; None: the model's.
        sha256: the expected SHA-256 of the checkpoint.
        num_classes: outputs of the classifier; None: timm's number.
        reset_head: whether to start with a new classifier on the loaded weights; the network is
            then trained by `training`, as one without weights is.
        image_size: side of the images in pixels, or height and width; None: timm's size.
        mean: per channel, for the normalisation of images; None: timm's values.
        std: per channel, as `mean`.
        args: further arguments of timm.create_model.
        training: the recipe of the dense training.
    """

    name: str
    pretrained: bool
    checkpoint: str | None
    weights: str | None = None
    sha256: str | None
    num_classes: int | None
    reset_head: bool
    image_size: int | Sequence[int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    args: Mapping[str, object]
    training: Recipe

    def __post_init__(self) -> None:
        check_name("model.name", self.name)
        if self.pretrained and self.checkpoint is not None:
            raise ConfigError("model.pretrained=true and model.checkpoint: expected one of them")
        if self.checkpoint is not None:
            check_path(self.checkpoint)
        elif self.weights is not None:
            raise ConfigError(
                f"model.weights={self.weights}: of a checkpoint; set model.checkpoint"
            )
        _check_size(self.image_size, self.args)
        skeleton = self.shared_skeleton()
        structure(skeleton)
        spec = self.spec()
        check_pixels("model", self.mean, self.std, spec.channels)
        for side, patch in zip(spec.size, _patch(skeleton), strict=True):
            if side % patch:
                raise ConfigError(
                    f"model.image_size={side}: not divisible by the patch size of {patch} pixels; "
                    f"{side // patch * patch} and {(side // patch + 1) * patch} are"
                )

    @property
    def has_weights(self) -> bool:
        """Whether weights are loaded, at least those of the backbone."""
        return self.pretrained or self.checkpoint is not None

    @property
    def trained(self) -> bool:
        """Whether all weights are loaded, so that no dense training is needed."""
        return self.has_weights and not self.reset_head

    @property
    def n_classes(self) -> int:
        """Outputs of the classifier."""
        return int(self.shared_skeleton().num_classes)  # type: ignore[arg-type]

    def description(self) -> dict[str, object]:
        """Return what a plan needs to build the dense skeleton: `name` and `args`."""
        return {"name": self.name, "args": self._arguments()}

    def spec(self) -> ImageSpec:
        """Return how images are prepared: timm's settings of this network, and those set here."""
        sides = _sides(self.image_size)
        return image_spec(self.shared_skeleton(), self.args, sides, self.mean, self.std)

    def fingerprint(self) -> str | None:
        """Return the SHA-256 of the checkpoint, checked against `sha256`.

        Raises:
            ConfigError: there is no such file, or its SHA-256 is not the expected one.
        """
        return None if self.checkpoint is None else fingerprint_of(self.checkpoint, self.sha256)

    def build(self, *, fetch: bool = True) -> nn.Module:
        """Return the dense network in eval mode on CPU, its weights loaded or random.

        Without `fetch` nothing is downloaded, and the hub's weights are replaced by random ones.

        Raises:
            ConfigError: the weights cannot be downloaded, do not fit, are a pickle, or are damaged.
        """
        if self.checkpoint is not None:
            skeleton = self.skeleton()
            model = self._untagged()
            state = read_checkpoint(
                self.checkpoint,
                model,
                skeleton,
                reset_head=self.reset_head,
                weights=self.weights,
            )
            return assign(skeleton, state, Plan(model=model, edits=())).eval()
        try:
            net: nn.Module = timm.create_model(
                self.name, pretrained=self.pretrained and fetch, **self._arguments()
            )
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"model.pretrained={self.pretrained}: could not download the weights of "
                f"{self.name} ({error}); model.checkpoint=FILE.safetensors loads a local copy"
            ) from None
        return net.eval()

    def skeleton(self) -> nn.Module:
        """Return the dense network without weights, on the meta device, as the caller's own."""
        return copy.deepcopy(self.shared_skeleton())

    def shared_skeleton(self) -> nn.Module:
        """Return the dense network without weights, built once: callers must not modify it."""
        try:
            return shared_skeleton(self._untagged())
        except PlanError as error:
            raise ConfigError(f"model: {error}") from None

    def _arguments(self) -> dict[str, object]:
        arguments = dict(self.args)
        if self.num_classes is not None:
            arguments["num_classes"] = self.num_classes
        sides = _sides(self.image_size)
        if sides is not None and not takes_any_size(self.name):
            height, width = sides
            arguments["img_size"] = height if height == width else [height, width]
        return arguments

    def _untagged(self) -> dict[str, object]:
        """Return the description without the tag of timm's weights."""
        return {"name": architecture(self.name), "args": self._arguments()}


def check_name(key: str, name: object) -> None:
    """Check that timm has a network of this name.

    Raises:
        ConfigError: it has none; similar names, if there are any.
    """
    name = str(name)
    if timm.is_model(architecture(name)):
        return
    similar = get_close_matches(name, timm.list_models(), n=5, cutoff=0.3)
    way_out = f"similar names: {', '.join(similar)}" if similar else "timm.list_models() has them"
    raise ConfigError(f"{key}={name}: timm {timm.__version__} has no such network; {way_out}")


def architecture(name: str) -> str:
    """Return a name of timm without the tag of its weights."""
    return name.split(".")[0]


def _sides(image_size: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return height and width of the images; None: timm's."""
    if image_size is None:
        return None
    return tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)


def _check_size(image_size: int | Sequence[int] | None, args: Mapping[str, object]) -> None:
    """Raise ConfigError unless the size is one side, or two, and not in `args` too."""
    if "img_size" in args:
        size = args["img_size"]
        raise ConfigError(f"model.args.img_size={size}: set model.image_size={size}")
    sides = _sides(image_size)
    if sides is not None and not (len(sides) == 2 and all(map(is_count, sides))):
        raise ConfigError(
            f"model.image_size={image_size}: expected a number of pixels, [height, width] or null"
        )


def image_spec(
    skeleton: nn.Module,
    args: Mapping[str, object],
    sides: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> ImageSpec:
    """Return how images are prepared for a network of timm; None stands for timm's settings.

    Args:
        skeleton: the network without weights.
        args: of timm.create_model, that it was built with.
        sides: height and width in pixels.
        mean: per channel, for the normalisation.
        std: per channel, as `mean`.
    """
    config = resolve_model_data_config(skeleton)
    channels, height, width = config["input_size"]
    in_chans = args.get("in_chans")
    height, width = sides or (height, width)
    return ImageSpec(
        channels=in_chans if isinstance(in_chans, int) else channels,
        size=(height, width),
        mean=config["mean"] if mean is None else mean,
        std=config["std"] if std is None else std,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )


def check_pixels(
    group: str, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> None:
    """Raise ConfigError unless `mean` and `std` are None or have a number for each channel."""
    for name, values, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        if values is None:
            continue
        numbers = all(type(value) in (int, float) and least < value < math.inf for value in values)
        if len(values) != channels or not numbers:
            raise ConfigError(
                f"{group}.{name}={values}: expected {channels} numbers"
                f"{' above 0' if least == 0.0 else ''}, or null"
            )


def takes_any_size(name: str) -> bool:
    """Whether the network pools a map of any size, and has no argument for the image size."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and not config.fixed_input_size and config.pool_size is not None


def _patch(net: nn.Module) -> tuple[int, int]:
    """Return the sides, in pixels, that the sides of an image must be multiples of."""
    embedding = getattr(net, "patch_embed", None)
    return embedding.patch_size if isinstance(embedding, PatchEmbed | HybridEmbed) else (1, 1)

"""A network of timm: how it is built, where its weights come from, what images it wants."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import HybridEmbed, PatchEmbed
from timm.models import swin_transformer, vision_transformer
from torch import Tensor, nn

from vitrim.data import ImageSpec
from vitrim.errors import ConfigError
from vitrim.files import MANIFEST, WEIGHTS, StoreError, sha256, verify
from vitrim.network import structure
from vitrim.network.skeleton import dense_skeleton
from vitrim.plan import Plan, PlanError
from vitrim.store import assign, misfits, read_tensors
from vitrim.trainer.recipe import Recipe

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)  # a scheme; one letter is a drive
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".tar", ".zip")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timm:
    """A dense network by timm's name; weights from timm's hub, a file, or training.

    `checkpoint` is a .safetensors file in timm's key layout, or a folder that vitrim saved;
    `sha256` pins its content; `mean` and `std`, per channel, are what its images are normalised by
    where that is not as timm says. `reset_head` starts a new classifier on the loaded weights: the
    whole is then trained by `training`, as a network without weights is. `args` go to
    timm.create_model.
    """

    name: str
    pretrained: bool
    checkpoint: str | None
    sha256: str | None
    num_classes: int | None
    reset_head: bool
    image_size: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    args: Mapping[str, Any]
    training: Recipe

    def __post_init__(self) -> None:
        if not timm.is_model(self.name.split(".")[0]):
            near = get_close_matches(self.name, timm.list_models(), n=5, cutoff=0.3)
            raise ConfigError(
                f"model.name={self.name}: timm {timm.__version__} has no such network; "
                f"near it: {', '.join(near)}"
            )
        if self.pretrained and self.checkpoint is not None:
            raise ConfigError("model.pretrained=true and model.checkpoint: expected one of them")
        _check_kind(self.checkpoint)
        skeleton = self.skeleton()
        structure(skeleton)
        self._check_pixels()
        for side, patch in zip(self.spec().size, _patch(skeleton), strict=True):
            if side % patch:
                raise ConfigError(
                    f"model.image_size={side}: not divisible by the patch of {patch} pixels; "
                    f"{side // patch * patch} and {(side // patch + 1) * patch} are"
                )

    def _check_pixels(self) -> None:
        channels = self.spec().channels
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            if values is None:
                continue
            numbers = all(type(v) in (int, float) and least < v < math.inf for v in values)
            if len(values) != channels or not numbers:
                raise ConfigError(
                    f"model.{name}={values}: expected {channels} numbers"
                    f"{' above 0' if name == 'std' else ''}, or null"
                )

    @property
    def sourced(self) -> bool:
        """Whether there are weights to begin with."""
        return self.pretrained or self.checkpoint is not None

    @property
    def trained(self) -> bool:
        """Whether all weights come from somewhere, so that no dense training is needed."""
        return self.sourced and not self.reset_head

    @property
    def n_classes(self) -> int:
        """Outputs of the classifier."""
        return int(self.skeleton().num_classes)  # type: ignore[arg-type]

    def description(self) -> dict[str, Any]:
        """Return what a plan needs to build the dense skeleton: `name` and `args`."""
        args = dict(self.args)
        if self.num_classes is not None:
            args["num_classes"] = self.num_classes
        if self.image_size is not None and not _takes_any_size(self.name):
            args["img_size"] = self.image_size
        return {"name": self.name, "args": args}

    def spec(self) -> ImageSpec:
        """Return how images are prepared: timm's settings of this network, and what is set here."""
        config = resolve_model_data_config(self.skeleton())
        channels, height, width = config["input_size"]
        size = (height, width) if self.image_size is None else (self.image_size, self.image_size)
        return ImageSpec(
            channels=self.args.get("in_chans", channels),
            size=size,
            mean=config["mean"] if self.mean is None else self.mean,
            std=config["std"] if self.std is None else self.std,
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
        )

    def fingerprint(self) -> str | None:
        """Return the SHA-256 of the checkpoint, checked against what is known of it.

        Raises:
            ConfigError: there is no such file, it is not what `sha256` or its manifest says.
        """
        if self.checkpoint is None:
            return None
        path = self._file()
        if not path.is_file():
            raise ConfigError(f"model.checkpoint={self.checkpoint}: no such file")
        digest = sha256(path)
        if self.sha256 is not None and digest != self.sha256:
            raise ConfigError(
                f"model.checkpoint={self.checkpoint}: its SHA-256 is {digest}, model.sha256 "
                f"expects {self.sha256}: the file is damaged or another one"
            )
        return digest

    def build(self, *, fetch: bool = True) -> nn.Module:
        """Return the dense network in eval mode on CPU, its weights loaded or freshly drawn.

        Without `fetch` those of the hub are left where they are, and drawn, too.

        Raises:
            ConfigError: the weights cannot be had, do not fit, are a pickle, or are damaged.
        """
        description = self.description()
        if self.checkpoint is None:
            try:
                net: nn.Module = timm.create_model(
                    self.name, pretrained=self.pretrained and fetch, **description["args"]
                )
            except (OSError, RuntimeError) as error:
                raise ConfigError(
                    f"model.pretrained={self.pretrained}: {self.name} could not be had ({error}); "
                    "model.checkpoint=FILE.safetensors loads a local copy"
                ) from None
            return net.eval()
        net = self.skeleton()
        return assign(net, self._state(net), Plan(model=self._described(), edits=())).eval()

    def skeleton(self) -> nn.Module:
        """Return the dense network without weights, on the meta device."""
        try:
            return dense_skeleton(self._described())
        except PlanError as error:
            raise ConfigError(f"model: {error}") from None

    def _described(self) -> dict[str, Any]:
        """Return the description without the tag of timm's weights."""
        return self.description() | {"name": self.name.split(".")[0]}

    def _file(self) -> Path:
        path = Path(str(self.checkpoint))
        return path / WEIGHTS if path.is_dir() else path

    def _state(self, net: nn.Module) -> dict[str, Tensor]:
        """Return the checkpoint's tensors, found fit for `net`."""
        path = self._file()
        try:
            if (path.parent / MANIFEST).is_file() and path.name == WEIGHTS:
                verify(path.parent, (WEIGHTS,))
            state = read_tensors(path)
        except StoreError as error:
            raise ConfigError(f"model.checkpoint={self.checkpoint}: {error}") from None
        state = _counters(net) | _adapted(net, state)
        if self.reset_head:
            state = _with_new_head(net, state)
        problems = misfits(net, state)
        if problems:
            raise ConfigError(
                f"model.checkpoint={self.checkpoint} does not fit {self.name} with "
                f"{self.n_classes} classes: {'; '.join(problems[:3])}; model.num_classes sets the "
                "classes, model.reset_head=true leaves the checkpoint's head out"
            )
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ConfigError(
                    f"model.checkpoint={self.checkpoint}: {name} is not finite, the file is damaged"
                )
        return {name: tensor.clone() for name, tensor in state.items()}


def _check_kind(checkpoint: str | None) -> None:
    """Refuse what names an address, or a kind of file that can run code when it is read."""
    named = str(checkpoint or "")
    if _ADDRESS.match(named):
        raise ConfigError(
            f"model.checkpoint={named}: an address; fetch the file yourself, give its path, and "
            "pin what it is with model.sha256"
        )
    if named.lower().endswith(_PICKLES):
        raise ConfigError(
            f"model.checkpoint={named}: a kind of file that can hold a pickle, which can run code: "
            "expected a .safetensors file, or a run folder"
        )


def _adapted(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` as timm's own filters change it: older layouts, other image sizes."""
    match net:
        case vision_transformer.VisionTransformer() if "pos_embed" in state:
            return dict(vision_transformer.checkpoint_filter_fn(state, net))
        case swin_transformer.SwinTransformer():
            tables = {name for name in state if name.endswith("relative_position_bias_table")}
            if tables <= net.state_dict().keys():  # of another network, the filter knows no place
                return dict(swin_transformer.checkpoint_filter_fn(state, net))
    return state


def _takes_any_size(name: str) -> bool:
    """Whether the network pools a map of any size, and is not told the size of its images."""
    config = timm.get_pretrained_cfg(name)
    return config is not None and not config.fixed_input_size and config.pool_size is not None


def _patch(net: nn.Module) -> tuple[int, int]:
    """Return the sides, in pixels, of which an image's have to be multiples."""
    embedding = getattr(net, "patch_embed", None)
    return embedding.patch_size if isinstance(embedding, PatchEmbed | HybridEmbed) else (1, 1)


def _counters(net: nn.Module) -> dict[str, Tensor]:
    """Return zeros for the batch counters of norms, which older checkpoints do not have."""
    return {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype)
        for name, tensor in net.named_buffers()
        if name.endswith(".num_batches_tracked")
    }


def _with_new_head(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with zero weights in place of the classifier's, for training to fill."""
    names = ("head", "head_dist", "linear_head", "fc", "classifier")
    heads = tuple(f"{name}." for name in names)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    fresh = {
        name: torch.zeros(tensor.shape)
        for name, tensor in net.state_dict().items()
        if name.startswith(heads)
    }
    return kept | fresh

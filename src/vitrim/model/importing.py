"""Weights of other libraries as a folder that `vitrim.load`, timm and `model.checkpoint=` read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from vitrim.errors import ConfigError
from vitrim.files import write
from vitrim.model.checkpoint import check_path, description_in, read, read_checkpoint, unwrapped
from vitrim.model.huggingface import KINDS, describe
from vitrim.model.layout import NAMES, layout_of
from vitrim.model.reading import ARRAYS, Described, config_of, file_of
from vitrim.network.skeleton import dense_skeleton
from vitrim.plan import Plan
from vitrim.store import assign, save

_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
_SWIN_SIZES = {96: ("tiny", "small"), 128: ("base",), 192: ("large",)}
_ENDINGS = (
    *("patch{p}_224", "patch{p}_dinov2", "patch{p}_reg4_dinov2", "patch{p}_dinov3_qkvb"),
    *("patch{p}_dinov3", "patch{p}_clip_quickgelu_224", "patch{p}_clip_224"),
    *("patch{p}_siglip_224", "patch{p}_siglip_gap_224"),
)
_HEADS = ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight", "linear_head.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What was imported: the folder, timm's `name` and `args`, and what config.json said."""

    folder: Path
    model: Mapping[str, object]
    described: Described


def import_weights(
    checkpoint: str, out: Path, *, layout: str | None, name: str | None, weights: str | None
) -> Imported:
    """Write the network of a checkpoint to `out`: plan, weights, manifest, timm's config.json.

    Args:
        checkpoint: a file or a folder of weights.
        out: the folder to write.
        layout: the layout of the keys; None: found.
        name: timm's name of the network; None: found by the config, or by the shapes.
        weights: which of several weights (`vitrim.model.reading.read_weights`).

    Raises:
        ConfigError: the file is damaged or refused, its layout or network is not known, or it
            does not fit.
        StoreError: the folder cannot be written.
    """
    check_path(checkpoint)
    if not file_of(checkpoint).is_file():
        raise ConfigError(f"{checkpoint}: no such file, or no weights in this folder")
    said = description_in(checkpoint)
    model = _description(checkpoint, said, layout=layout, name=name, weights=weights)
    net = dense_skeleton(model)
    state = read_checkpoint(
        checkpoint, model, net, reset_head=False, weights=weights, layout=layout
    )
    plan = Plan(model=model, edits=())
    net = assign(net, state, plan).eval()
    save(out, net, plan)
    text = json.dumps(_config(net, model, said))
    write(out / "config.json", lambda path: path.write_text(text))
    return Imported(folder=out.absolute(), model=model, described=said)


def _description(
    checkpoint: str, said: Described, *, layout: str | None, name: str | None, weights: str | None
) -> dict[str, object]:
    """Return timm's `name` and `args` of the network that the weights are of."""
    if checkpoint.lower().endswith(ARRAYS):
        if name is None:
            raise ConfigError(f"{checkpoint}: --model NAME says which network .npz files are of")
        return {"name": name, "args": {}}
    state = read(checkpoint, weights)
    config = config_of(Path(checkpoint))
    kinds = config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else None
    if name is None and kind in KINDS:
        return describe(kind, config, state)
    if name is None and isinstance(config.get("architecture"), str):
        args = config.get("model_args")
        classes = {} if said.num_classes is None else {"num_classes": said.num_classes}
        given = args if isinstance(args, dict) else {}
        return {"name": config["architecture"], "args": {**given, **classes}}
    bare = unwrapped(state, {})
    found = layout_of(bare) if layout is None else NAMES[layout]
    if found is not None and not found.missing(bare):
        bare = found.to_timm(bare, ())
    for candidate in _candidates(bare) if name is None else (name,):
        model = _fitting(candidate, bare, certain=name is not None)
        if model is not None:
            return model
    raise ConfigError(
        f"{checkpoint}: no network of timm is known by these shapes; --model NAME says which it is"
    )


def _candidates(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Iterate over timm's names of networks whose patch embedding has the shape of the state's."""
    embedding = state.get("patch_embed.proj.weight")
    if embedding is None or embedding.ndim != 4:
        return
    dim, patch = len(embedding), embedding.shape[-1]
    size = _SIZES.get(dim, "")
    names = [f"vit_{size}_{ending.format(p=patch)}" for ending in _ENDINGS]
    names += [f"deit_{size}_distilled_patch{patch}_224", f"deit3_{size}_patch{patch}_224"]
    names += [f"swin_{one}_patch{patch}_window7_224" for one in _SWIN_SIZES.get(dim, ())]
    yield from (name for name in names if timm.is_model(name))


def _fitting(name: str, state: Mapping[str, Tensor], *, certain: bool) -> dict[str, object] | None:
    """Return the description of a network of this name with the classes and size of the state.

    None where the tensors are others, unless the network is certain: then a message about it comes
    when the tensors are loaded.

    Raises:
        ConfigError: timm has no network of this name.
    """
    if not timm.is_model(name):
        raise ConfigError(f"--model {name}: timm {timm.__version__} has no such network")
    classes = next((len(state[key]) for key in _HEADS if key in state), 0)
    args: dict[str, object] = {"num_classes": classes}
    net = dense_skeleton({"name": name, "args": args})
    side = _side(net, state)
    if side is not None:
        args["img_size"] = side
        net = dense_skeleton({"name": name, "args": args})
    expected = net.state_dict()
    fits = expected.keys() <= state.keys() and all(
        state[key].shape == tensor.shape for key, tensor in expected.items()
    )
    return {"name": name, "args": args} if fits or certain else None


def _side(net: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Return the side of the images if the positions are of others than timm's network has."""
    given, own = state.get("pos_embed"), getattr(net, "pos_embed", None)
    embedding = getattr(net, "patch_embed", None)
    if given is None or not isinstance(own, Tensor) or given.shape == own.shape:
        return None
    prefix = own.shape[1] - int(embedding.num_patches)  # type: ignore[union-attr]
    grid = math.isqrt(max(0, given.shape[1] - prefix))
    patch: int = embedding.patch_size[0]  # type: ignore[union-attr]
    return grid * patch if grid and grid**2 == given.shape[1] - prefix else None


def _config(net: nn.Module, model: Mapping[str, object], said: Described) -> dict[str, object]:
    """Return timm's config.json of the network, with what the source said of its images."""
    config = resolve_model_data_config(net)
    channels, height, width = config["input_size"]
    args = model["args"]
    assert isinstance(args, Mapping)
    size = said.image_size or args.get("img_size") or (height, width)
    sides: Sequence[object] = (size, size) if isinstance(size, int) else size
    return {
        "architecture": model["name"],
        "num_classes": net.num_classes,
        **({"label_names": [*said.classes]} if len(said.classes) == net.num_classes else {}),
        "model_args": dict(args),
        "pretrained_cfg": {
            "num_classes": net.num_classes,
            "input_size": [args.get("in_chans", channels), *sides],
            "mean": said.mean or [*config["mean"]],
            "std": said.std or [*config["std"]],
            "interpolation": config["interpolation"],
            "crop_pct": config["crop_pct"],
        },
    }

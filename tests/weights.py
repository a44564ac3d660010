"""Which weights are read, and how exactly: `python -m tests.weights > docs/weights.md`.

A row is a network of another library with few and random weights. A column is a file or folder in
which it was saved. vitrim loads it into timm's network; an entry is the largest difference of an
output, on images of noise, to that of the other library's own network.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.model.huggingface import describe, from_hf, pooled
from vitrim.model.source import Timm
from vitrim.trainer.recipe import Recipe

SIDE, CLASSES = 32, 5
Net = tuple[nn.Module, Callable[[Tensor], Tensor], dict[str, object]]
State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network of another library, and what timm's equal network is called.

    `make` returns the network, its forward pass and the description; `on_disk` its tensors as the
    library's files have them.
    """

    layout: str
    library: str
    make: Callable[[], Net]
    on_disk: Callable[[nn.Module], State] = lambda net: dict(net.state_dict())


def randomised(net: nn.Module) -> nn.Module:
    """Return the network in eval mode with random weights that float16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in net.parameters():
            noise = 0.2 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.bfloat16().half())
    return net.eval()


def of_transformers(kind: str, config: str, **options: Any) -> Callable[[], Net]:
    """Return what builds a network of transformers."""

    def make() -> Net:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        net = randomised(getattr(transformers, kind)(getattr(transformers, config)(**options)))

        def logits(images: Tensor) -> Tensor:
            return pooled(net(pixel_values=images), kind)

        return net, logits, describe(kind, net.config.to_dict(), net.state_dict())

    return make


def saved_by_transformers(net: nn.Module) -> State:
    """Return the tensors as save_pretrained writes them, which differ in name from those in RAM."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)  # type: ignore[operator]
        return load_file(Path(folder) / "model.safetensors")


def of_torchvision(kind: str, name: str, args: Mapping[str, object], **options: Any) -> Any:
    """Return what builds a network of torchvision."""

    def make() -> Net:
        from torchvision.models import swin_transformer, vision_transformer

        of_kind = {**vars(vision_transformer), **vars(swin_transformer)}[kind]
        net = randomised(of_kind(**options, num_classes=CLASSES))
        return net, net, {"name": name, "args": {**args, "num_classes": CLASSES}}

    return make


def of_timm(name: str, **args: Any) -> Callable[[], Net]:
    """Return what builds a network of timm, whose weights a hub has by other names."""

    def make() -> Net:
        args_of = {"img_size": SIDE, "num_classes": CLASSES, **args}
        net = randomised(timm.create_model(name, **args_of))
        return net, net, {"name": name, "args": args_of}

    return make


SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "image_size": SIDE,
    "patch_size": 16,
}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
TOWERS = {"vision_config": SMALL, "text_config": TEXT, "num_labels": CLASSES}
SWIN = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3}


def _hf(layout: str, kind: str, config: str, **options: Any) -> Case:
    return Case(
        layout=layout,
        library=kind,
        make=of_transformers(kind, config, **options),
        on_disk=saved_by_transformers,
    )


def with_mask_token(net: nn.Module) -> State:
    """Return the tensors as DINOv2's hub names them."""
    state = dict(net.state_dict())
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        positions = torch.cat(
            [torch.zeros(1, 1, state["pos_embed"].shape[2]), state["pos_embed"]], 1
        )
        state["pos_embed"] = positions
    return {**state, "mask_token": torch.zeros(1, 24)}


def of_dinov3(net: nn.Module) -> State:
    """Return the tensors as DINOv3's hub names them."""
    state: State = {"mask_token": torch.zeros(1, 24), "rope_embed.periods": torch.ones(2)}
    for key, tensor in net.state_dict().items():
        name = key.replace("gamma_", "ls").replace("reg_token", "storage_tokens")
        if name.endswith(("ls1", "ls2")):
            name += ".gamma"
        if key.endswith(("q_bias", "v_bias")):
            continue
        state[name] = tensor
        if key.endswith("qkv.weight"):
            block = net.get_submodule(key.removesuffix(".qkv.weight"))
            bias = torch.cat([block.q_bias, torch.zeros(24), block.v_bias]).detach()
            state[key.replace("weight", "bias")] = bias
            state[key.replace("weight", "bias_mask")] = torch.ones(72)
    return state


CASES = {
    "transformers ViT": _hf(
        "transformers-vit", "ViTForImageClassification", "ViTConfig", **SMALL, num_labels=CLASSES
    ),
    "transformers ViT, no head": _hf("transformers-vit", "ViTModel", "ViTConfig", **SMALL),
    "transformers DeiT": _hf(
        "transformers-deit", "DeiTForImageClassification", "DeiTConfig", **SMALL, num_labels=CLASSES
    ),
    "transformers DeiT, distilled": _hf(
        "transformers-deit",
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        **SMALL,
        num_labels=CLASSES,
    ),
    "transformers DINOv2": _hf(
        "transformers-dinov2",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        **SMALL,
        num_labels=CLASSES,
    ),
    "transformers DINOv2, no head": _hf(
        "transformers-dinov2", "Dinov2Model", "Dinov2Config", **SMALL
    ),
    "transformers DINOv2, SwiGLU": _hf(
        "transformers-dinov2", "Dinov2Model", "Dinov2Config", **SMALL, use_swiglu_ffn=True
    ),
    "transformers DINOv2, registers": _hf(
        "transformers-dinov2",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        **SMALL,
        num_labels=CLASSES,
    ),
    "transformers DINOv3": _hf(
        "transformers-dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", **SMALL, num_register_tokens=4
    ),
    "transformers DINOv3, gated": _hf(
        "transformers-dinov3",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        **SMALL,
        use_gated_mlp=True,
        hidden_act="silu",
    ),
    "transformers Swin": _hf(
        "transformers-swin",
        "SwinForImageClassification",
        "SwinConfig",
        **SWIN,
        image_size=SIDE,
        num_labels=CLASSES,
    ),
    "transformers SigLIP, pooled": _hf(
        "transformers-siglip", "SiglipVisionModel", "SiglipVisionConfig", **SMALL
    ),
    "transformers SigLIP": _hf(
        "transformers-siglip", "SiglipForImageClassification", "SiglipConfig", **TOWERS
    ),
    "transformers CLIP, projected": _hf(
        "transformers-clip",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        **SMALL,
        projection_dim=20,
    ),
    "transformers CLIP": _hf(
        "transformers-clip", "CLIPForImageClassification", "CLIPConfig", **TOWERS
    ),
    "torchvision ViT": Case(
        layout="torchvision-vit",
        library="VisionTransformer",
        make=of_torchvision(
            "VisionTransformer",
            "vit_base_patch16_224",
            {**VIT, "img_size": SIDE, "mlp_ratio": 2.0},
            **{"image_size": SIDE, "patch_size": 16, "num_layers": 2, "num_heads": 3},
            **{"hidden_dim": 24, "mlp_dim": 48},
        ),
    ),
    "torchvision Swin": Case(
        layout="torchvision-swin",
        library="SwinTransformer",
        make=of_torchvision(
            "SwinTransformer",
            "swin_tiny_patch4_window7_224",
            {**SWIN, "img_size": SIDE},
            **{"patch_size": [4, 4], "window_size": [4, 4]},
            **{key: SWIN[key] for key in ("embed_dim", "depths", "num_heads")},
        ),
    ),
    "timm ViT": Case(
        layout="timm-vit", library="timm", make=of_timm("vit_base_patch16_224", **VIT)
    ),
    "timm Swin": Case(
        layout="timm-swin", library="timm", make=of_timm("swin_tiny_patch4_window7_224", **SWIN)
    ),
    "DeiT's hub": Case(
        layout="deit-hub",
        library="timm",
        make=of_timm("deit_tiny_distilled_patch16_224", **VIT),
    ),
    "DINOv2's hub": Case(
        layout="dinov2-hub",
        library="timm",
        make=of_timm("vit_small_patch14_dinov2", **VIT, patch_size=16),
        on_disk=with_mask_token,
    ),
    "DINOv2's hub, registers": Case(
        layout="dinov2-hub",
        library="timm",
        make=of_timm("vit_small_patch14_reg4_dinov2", **VIT, patch_size=16),
        on_disk=with_mask_token,
    ),
    "DINOv3's hub": Case(
        layout="dinov3-hub",
        library="timm",
        make=of_timm("vit_small_patch16_dinov3_qkvb", **VIT),
        on_disk=of_dinov3,
    ),
}


def lightning(state: State, path: Path) -> None:
    """Write a Lightning checkpoint of a module that has the network as `net`, and a loss."""
    inside = {f"net.{key}": tensor for key, tensor in state.items()}
    torch.save({"epoch": 3, "state_dict": {**inside, "loss.weight": torch.ones(3)}}, path)


def with_averages(state: State, path: Path) -> None:
    """Write a timm checkpoint with averages, which are the weights, and zeros as the model's."""
    averages = {f"module.{key}": tensor for key, tensor in state.items()}
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    torch.save({"epoch": 3, "state_dict": zeros, "state_dict_ema": averages}, path)


FILES: dict[str, tuple[str, str | None, Callable[[State, Path], object]]] = {
    ".safetensors": ("net.safetensors", None, save_file),
    ".safetensors, float16": (
        "net.safetensors",
        None,
        lambda state, path: save_file({k: t.half() for k, t in state.items()}, path),
    ),
    ".bin, bfloat16": (
        "pytorch_model.bin",
        None,
        lambda state, path: torch.save({k: t.bfloat16() for k, t in state.items()}, path),
    ),
    ".pth": ("net.pth", None, torch.save),
    ".ckpt, `net.`": ("last.ckpt", None, lightning),
    ".pth.tar, EMA": ("best.pth.tar", "ema", with_averages),
}
"""By column: the name of the file, `model.weights`, and what writes it."""


def model_of(description: Mapping[str, Any], checkpoint: Path, weights: str | None) -> Timm:
    """Return the configuration of the network with a checkpoint."""
    args = dict(description["args"])
    return Timm(
        name=description["name"],
        pretrained=False,
        checkpoint=str(checkpoint),
        weights=weights,
        sha256=None,
        num_classes=args.pop("num_classes"),
        reset_head=False,
        image_size=args.pop("img_size"),
        mean=None,
        std=None,
        args=args,
        training=Recipe.__new__(Recipe),
    )


@cache
def made(name: str) -> Net:
    """Return the network of a case, its forward pass and description; built once."""
    return CASES[name].make()


def images() -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def difference(name: str, column: str, folder: Path) -> float:
    """Return the largest difference of an output where the weights come from a file."""
    net, logits, description = made(name)
    file, weights, write = FILES[column]
    state = {key: tensor.contiguous() for key, tensor in CASES[name].on_disk(net).items()}
    write(state, folder / file)
    return _largest(logits, model_of(description, folder / file, weights).build())


def difference_of_instance(name: str) -> float:
    """Return the same for `vitrim.from_hf` on an instance of transformers."""
    net, logits, _ = made(name)
    return _largest(logits, from_hf(net))


def largest_output(name: str) -> float:
    """Return the largest absolute output of the library's own network."""
    with torch.no_grad():
        return float(made(name)[1](images()).abs().max())


def _largest(logits: Callable[[Tensor], Tensor], ours: nn.Module) -> float:
    with torch.no_grad():
        return float((logits(images()) - ours(images())).abs().max())


def write_augreg(path: Path) -> Net:
    """Write a ViT as AugReg's .npz, which JAX's networks are in, and return it."""
    net, logits, description = of_timm("vit_base_patch16_224", **VIT)()
    state = {key: tensor.detach().numpy() for key, tensor in net.state_dict().items()}
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for at in range(2):
        of, to = f"blocks.{at}.", f"Transformer/encoderblock_{at}/"
        for norm, jax in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{to}{jax}/scale"] = state[f"{of}{norm}.weight"]
            arrays[f"{to}{jax}/bias"] = state[f"{of}{norm}.bias"]
        attention = f"{to}MultiHeadDotProductAttention_1/"
        for part, part_name in enumerate(("query", "key", "value")):
            rows = slice(24 * part, 24 * part + 24)
            kernel = state[f"{of}attn.qkv.weight"][rows].T.reshape(24, 3, 8)
            arrays[f"{attention}{part_name}/kernel"] = kernel
            arrays[f"{attention}{part_name}/bias"] = state[f"{of}attn.qkv.bias"][rows].reshape(3, 8)
        arrays[f"{attention}out/kernel"] = state[f"{of}attn.proj.weight"].T.reshape(3, 8, 24)
        arrays[f"{attention}out/bias"] = state[f"{of}attn.proj.bias"]
        for layer in range(2):
            fc = f"{of}mlp.fc{layer + 1}"
            arrays[f"{to}MlpBlock_3/Dense_{layer}/kernel"] = state[f"{fc}.weight"].T
            arrays[f"{to}MlpBlock_3/Dense_{layer}/bias"] = state[f"{fc}.bias"]
    np.savez(path, **arrays)
    return net, logits, description


def difference_of_arrays(folder: Path) -> float:
    """Return the largest difference of an output where the weights come from AugReg's .npz."""
    _, logits, description = write_augreg(folder / "net.npz")
    return _largest(logits, model_of(description, folder / "net.npz", None).build())


def table() -> str:
    """Return the page: a Markdown table of all cases and files."""
    packages = ["transformers", "torchvision", "timm", "torch"]
    head = ["network", "layout", "library's class", "largest output", "`from_hf`", *FILES]
    rows = []
    for name, case in CASES.items():
        is_instance = case.layout.startswith("transformers")
        cells = [f"{largest_output(name):.2f}"]
        cells.append(f"{difference_of_instance(name):.1e}" if is_instance else "")
        for column in FILES:
            with tempfile.TemporaryDirectory() as folder:
                cells.append(f"{difference(name, column, Path(folder)):.1e}")
        rows.append([name, case.layout, case.library, *cells])
    with tempfile.TemporaryDirectory() as folder:
        cell = f"{difference_of_arrays(Path(folder)):.1e}"
    rest = [""] * (len(FILES) - 1)
    rows.append(["AugReg's ViT", "augreg", "timm", "", "", f"{cell} (.npz)", *rest])
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    known = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return INTRODUCTION.format(known=known) + "\n".join(lines) + "\n"


INTRODUCTION = """# Weights of other libraries

Which files `model.checkpoint=` and `vitrim-import` read, and how exactly. Each row is a network of
another library with two blocks and random weights. vitrim loads it from the file of the column into
timm's network. An entry is the largest difference of an output, for three images of noise, to that
of the library's own network in float32. Weights are rounded before, so that files in float16 and
bfloat16 hold the same numbers. `from_hf` takes the network itself, without a file. Where the class
is *timm*, the library of the hub is not installed: its names are written, and timm's network is the
reference.

`python -m tests.weights > docs/weights.md` made this page, with {known}.

"""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(table(), end="")

"""Small networks with random numbers, strategies for plans, images, and a trainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from vitrim import Keep, Plan
from vitrim.network import sites
from vitrim.network.skeleton import on_meta
from vitrim.network.structure import Site

if TYPE_CHECKING:
    from vitrim.data.image_files import ImageFiles

SIZE = 32
TINY = {
    "img_size": SIZE,
    "embed_dim": 24,
    "num_heads": 3,
    "depth": 2,
    "mlp_ratio": 2.0,
    "num_classes": 7,
}
MODEL = {"name": "vit_tiny_patch16_224", "args": TINY}
"""5 tokens, 3 heads of 8 dims, 48 hidden units."""


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Randomise every parameter, so that no bias is zero and no norm or layer scale is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            vector = parameter.ndim == 1
            fan_in = parameter.numel() / parameter.shape[0]
            parameter.copy_(1 + 0.3 * noise if vector else 1.5 * noise / fan_in**0.5)
    return net.eval()


def small_net(
    name: str = MODEL["name"], *, dtype: torch.dtype = torch.float64, seed: int = 0, **args: Any
) -> nn.Module:
    """Return a random network of timm in eval mode; `args` change those of TINY."""
    net = timm.create_model(name, pretrained=False, **{**TINY, **args})
    return randomise(net.to(dtype), seed)


def skeleton_net(name: str = MODEL["name"], **args: Any) -> nn.Module:
    """Return a network without weights, on the meta device."""
    with on_meta():
        return timm.create_model(name, pretrained=False, **args)


def images(size: int = SIZE, *, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def outputs(net: nn.Module, x: Tensor) -> Tensor:
    """Return the features of every token and the logits in one vector."""
    features = net.forward_features(x)
    return torch.cat([features.flatten(), net.forward_head(features).flatten()])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def plan_of(kept: Mapping[str, Sequence[int]], model: Mapping[str, Any] = MODEL) -> Plan:
    """Return the plan that keeps these units, by site."""
    edits = tuple(Keep(site=site, index=tuple(index)) for site, index in kept.items())
    return Plan(model=model, edits=edits)


def silenced(net: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of a plain `net` that multiplies the activations `plan` removes by zero.

    An oracle of its own: it knows timm's modules and nothing of vitrim.
    """
    twin = copy.deepcopy(net)
    for keep in plan.keeps():
        path, _, kind = keep.site.rpartition(".")
        block = twin.get_submodule(path)
        match kind:
            case "input":
                readers = [m for n, m in block.named_children() if n.startswith(("qkv", "fc1"))]
            case "hidden":
                readers = [block.fc2]
            case "heads" | "v":
                readers = [block.proj]
            case "qk":
                _silence_outputs(block.qkv, keep.index)
                continue
        for reader in readers:
            _silence_inputs(reader, keep.index, repeats=_width(block, kind))
    return twin


def _width(block: nn.Module, kind: str) -> int:
    return block.proj.in_features // block.num_heads if kind == "heads" else 1


def _silence_inputs(reader: nn.Module, index: Sequence[int], *, repeats: int) -> None:
    mask = torch.zeros(reader.in_features // repeats, dtype=reader.weight.dtype)
    mask[list(index)] = 1.0
    mask = mask.repeat_interleave(repeats)
    reader.register_forward_pre_hook(lambda module, args: (args[0] * mask,))


def _silence_outputs(qkv: nn.Module, index: Sequence[int]) -> None:
    width = qkv.out_features // 3
    mask = torch.zeros(width, dtype=qkv.weight.dtype)
    mask[list(index)] = 1.0
    mask = torch.cat([mask, mask, torch.ones_like(mask)])
    qkv.register_forward_hook(lambda module, args, output: output * mask)


def heads_of(site: Site) -> list[range]:
    """Return the units of each head of a site, or all of them where the site has no heads."""
    ends = accumulate(site.head_dims or (site.size,), initial=0)
    return [range(start, end) for start, end in pairwise(ends)]


@st.composite
def plans(draw: st.DrawFn, described: Mapping[str, Site], model: Mapping[str, Any] = MODEL) -> Plan:
    """Draw any plan for these sites: any subset, any units; whole heads may be removed."""
    kept = {
        name: _subset(draw, site)
        for name, site in described.items()
        if site.size and draw(st.booleans())
    }
    for name in [name for name in kept if name.endswith(".heads")]:
        _agree(draw, described, kept, name.removesuffix("heads"))
    return plan_of(kept, model)


def _subset(draw: st.DrawFn, site: Site) -> list[int]:
    masks = [(units, draw(st.integers(0, 2 ** len(units) - 1))) for units in heads_of(site)]
    kept = [unit for units, mask in masks for bit, unit in enumerate(units) if mask >> bit & 1]
    return kept or [draw(st.integers(0, site.size - 1))]


def _agree(
    draw: st.DrawFn, described: Mapping[str, Site], kept: dict[str, list[int]], attn: str
) -> None:
    """Keep a value dim in one of the kept heads: an attention without any is refused."""
    alive = {
        unit for head in kept[f"{attn}heads"] for unit in heads_of(described[f"{attn}v"])[head]
    }
    v = kept.get(f"{attn}v")
    if v is not None and not alive & set(v):
        kept[f"{attn}v"] = sorted({*v, draw(st.sampled_from(sorted(alive)))})


PLANS = plans(sites(small_net()))
"""Plans that fit `small_net()`."""


def fit(phase: LightningModule, data: Any, *, epochs: int = 1) -> None:
    """Train `phase` on a loader or data module, with a real trainer that writes no files."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(phase.train(), data)


PLAIN = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0}
MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}


def images_in(root: Path, **changes: Any) -> ImageFiles:
    """Return the images in `root`, without mixing and bad images; `changes` override that."""
    from vitrim.data.imagefolder import image_folder

    arguments: dict[str, Any] = {
        "root": str(root),
        "train": "train",
        "val": "val",
        "classes": None,
        "class_seed": 0,
        "samples": None,
        "samples_seed": 0,
        "batch_size": 4,
        "workers": 0,
        "bad_images": {"limit": 0, "evaluation": "fail"},
        "augmentation": {"auto_augment": None, "color_jitter": 0.0},
        "mixing": PLAIN,
    }
    return image_folder(**{**arguments, **changes})

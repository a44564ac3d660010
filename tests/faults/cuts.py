"""`python -m tests.faults.cuts --cases N`: random plans, the cut network against its masked twin.

Every family is there, as one small network of random weights. A plan keeps random units of random
sites, drops random branches and factorises random layers; one of ten is made in two steps. In
float32 the logits of both networks may differ by 1e-5 of the largest one; where they differ by
more, they may not in float64 by 1e-12 (`rounding`). The counter, the closed formula and the
parameters themselves have to agree exactly. The nightly number is 50,000.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitrim import Drop, Keep, LowRank, Plan, combine, count, cut, masked
from vitrim.budget.cost import Cost
from vitrim.measure import image_shape
from vitrim.network import structure
from vitrim.network.structure import Structure, factorisable_rows, members
from vitrim.network.survivors import resolve
from vitrim.plan import PlanError, dumps

TOLERANCE, IN_FLOAT64 = 1e-5, 1e-12
VIT = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 7}
P14 = {**VIT, "img_size": 28}
SWIN: dict[str, Any] = {
    "img_size": 40,
    "window_size": 4,
    "embed_dim": 12,
    "depths": [2, 2],
    "num_heads": [2, 3],
    "num_classes": 7,
}
CNN = {"layers": [2, 2, 1, 2], "channels": [6, 8, 8, 10], "num_classes": 7}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12], "num_classes": 7}
TWINS = {"img_size": 64, "embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_classes": 7}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit, pooled": ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}),
    "vit, normalised q and k": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True}),
    "vit, no biases": ("vit_tiny_patch16_224", {**VIT, "qkv_bias": False, "init_values": 0.1}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "deit3": ("deit3_small_patch16_224", VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", P14),
    "dinov2, linear classifier": ("dinov2_vits14_lc", {**VIT, "depth": 4, "img_size": None}),
    "clip": ("vit_base_patch32_clip_224", VIT),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "flexivit": ("flexivit_small", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin v2": ("swinv2_tiny_window8_256", {**SWIN, "img_size": 32}),
    "beit": ("beit_base_patch16_224", VIT),
    "beit, SwiGLU": ("beit_base_patch16_224", {**VIT, "swiglu_mlp": True, "init_values": None}),
    "beit v2": ("beitv2_base_patch16_224", VIT),
    "eva": ("eva_giant_patch14_clip_224", P14),
    "eva-02": ("eva02_tiny_patch14_224", P14),
    "eva-02, q, k and v apart": ("eva02_base_patch14_224", {**P14, "scale_mlp": False}),
    "eva-02, normalised": ("eva02_base_patch14_224", P14),
    "eva, post-norm": ("eva02_tiny_patch14_224", {**P14, "use_post_norm": True}),
    "dinov3": ("vit_small_patch16_dinov3", VIT),
    "rope": ("vit_small_patch16_rope_224", VIT),
    "rope, mixed": ("vit_small_patch16_rope_mixed_224", VIT),
    "resnet, basic": ("resnet18", CNN),
    "resnet, bottleneck": ("resnet50", CNN),
    "mobilenet": ("mobilenetv2_035", {"depth_multiplier": 0.5, "num_classes": 7}),
    "cait": ("cait_xxs24_224", VIT),
    "xcit": ("xcit_nano_12_p16_224", VIT),
    "convit": ("convit_tiny", {**VIT, "embed_dim": 8, "local_up_to_layer": 1}),
    "pvt v2": ("pvt_v2_b0", {"embed_dims": [8, 16, 40, 64], "num_classes": 7}),
    "levit": (
        "levit_128s",
        {"img_size": 64, "embed_dim": [16, 24, 32], "key_dim": 8, "num_heads": [2, 3, 4]},
    ),
    "mobilevit v2": ("mobilevitv2_050", {"num_classes": 7}),
    "convnext": ("convnext_atto", {**CONVNEXT, "conv_mlp": False}),
    "convnext, convolutions": ("convnext_atto", {**CONVNEXT, "conv_mlp": True}),
    "pit": ("pit_ti_224", {"img_size": 64, "base_dims": [8] * 3, "depth": [1] * 3}),
    "mixer": ("mixer_s32_224", {"img_size": 64, "num_classes": 7}),
    "resmlp": ("resmlp_12_224", {"img_size": 32, "num_classes": 7}),
    "twins": ("twins_svt_small", TWINS),
    "crossvit": ("crossvit_tiny_240", {"num_classes": 7}),
    "tnt": ("tnt_s_patch16_224", {"depth": 2, "img_size": 32, "num_classes": 7}),
    "nest": ("nest_tiny", {"img_size": 64, "num_classes": 7}),
    "davit": ("davit_tiny", {"depths": [1, 1, 1, 1], "num_classes": 7}),
    "hiera": ("hiera_tiny_224", {"num_classes": 7}),
    "mvitv2": ("mvitv2_tiny", {"img_size": 64, "num_classes": 7}),
    "focalnet": ("focalnet_tiny_srf", {"num_classes": 7}),
    "sam": ("samvit_base_patch16_224", {**VIT, "global_attn_indexes": [1]}),
    "edgenext": ("edgenext_xx_small", {"num_classes": 7}),
    "gcvit": ("gcvit_xxtiny", {"num_classes": 7}),
    "volo": ("volo_d1_224", {"img_size": 64, "num_classes": 7}),
}
"""By family: timm's name, and the arguments that make a small network."""
SIDES = {"hiera": 224, "crossvit": 240, "gcvit": 224}
"""Images of networks that take no others, in pixels; 64 where `img_size` does not say."""
LARGE = (
    *("swin v2", "resnet, basic", "resnet, bottleneck", "mobilenet", "mobilevit v2", "pvt v2"),
    *("xcit", "levit", "mixer", "resmlp", "twins", "tnt", "edgenext"),
)
LARGEST = ("crossvit", "nest", "davit", "hiera", "mvitv2", "gcvit", "focalnet", "volo")
"""Networks that cannot be made as small, which get fewer plans than the others."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A dense network, an image for it, and its closed formula."""

    family: str
    net: nn.Module
    image: Tensor
    logits: Tensor
    cost: Cost

    @torch.no_grad()
    def is_unchanged(self, compact: nn.Module) -> bool:
        """Whether a cut did not change the logits: then the comparison says nothing."""
        return bool(torch.equal(compact(self.image), self.logits))


@dataclass(kw_only=True)
class Found:
    """What came of the cases: counts, and the largest difference."""

    counts: Counter[str]
    begun: float = field(default_factory=time.monotonic)
    largest: float = 0.0
    worst: str = ""

    def row(self) -> dict[str, object]:
        """Return the row of the table."""
        self.counts["seconds"] = round(time.monotonic() - self.begun)
        return {**self.counts, "largest difference": f"{self.largest:.1e} ({self.worst})"}


def made(family: str) -> Network:
    """Return the network of a family, with random weights."""
    name, args = NETWORKS[family]
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, **args).eval()
    with torch.no_grad():
        for tensor in net.parameters():  # no bias is zero, no norm or layer scale one
            spread = 0.3 if tensor.ndim == 1 else 1.5 / (tensor.numel() / len(tensor)) ** 0.5
            (tensor.add_ if tensor.ndim == 1 else tensor.copy_)(spread * torch.randn(tensor.shape))
        for name, buffer in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand(buffer.shape))
    side = SIDES.get(family) or args.get("img_size") or (28 if "dinov2" in family else 64)
    shape = image_shape(net, side)
    image = torch.randn(1, *shape)
    with torch.no_grad():
        logits = net(image)
    return Network(family=family, net=net, image=image, logits=logits, cost=Cost(net, shape))


def random_plan(net: nn.Module, generator: random.Random, *, ranks: bool = True) -> Plan:
    """Return a plan that fits `net`; one that leaves an attention without heads is drawn again."""
    described = structure(net)
    while True:
        plan = Plan(model={}, edits=tuple(_edits(described, generator, ranks=ranks)))
        try:
            resolve(described, plan)
        except PlanError as error:
            if "no kept head" not in str(error):
                raise
        else:
            return plan


def _edits(
    described: Structure, generator: random.Random, *, ranks: bool
) -> list[Keep | LowRank | Drop]:
    """Draw edits: units of each site with a chance of a half, and in some plans drops and ranks."""
    drops = generator.random() < 0.3
    dropped = {b.name for b in described.branches if drops and generator.random() < 0.2}
    inside = members(described, dropped)
    edits: list[Keep | LowRank | Drop] = [Drop(branch=name) for name in sorted(dropped)]
    for site in described.sites.values():
        free = site.size > 0 and not site.locked_reason and site.name not in inside
        if free and generator.random() < 0.5:
            kept = generator.sample(range(site.size), generator.randint(1, site.size))
            edits.append(Keep(site=site.name, index=tuple(sorted(kept))))
    if ranks and generator.random() < 0.4:
        edits += _ranks(described, inside, generator)
    return edits


def _ranks(described: Structure, inside: set[str], generator: random.Random) -> list[LowRank]:
    edits = []
    for layer in described.layers:
        if layer.factor or layer.locked_reason or layer.name in inside or generator.random() > 0.25:
            continue
        names = [*factorisable_rows(layer)]
        chosen = names[:1] if generator.random() < 0.5 else names[1:] or names
        rows, columns = factorisable_rows(layer), sum(part.size for part in layer.inp)
        for name in chosen:
            limit = min(sum(part.size for part in rows[name]), columns)
            if limit:
                edits.append(LowRank(linear=name, rank=generator.randint(1, limit)))
    return edits


def _case(network: Network, generator: random.Random) -> tuple[nn.Module, Plan]:
    """Return a cut network and its plan on the dense one, in one step or in two."""
    if generator.random() < 0.9:
        plan = random_plan(network.net, generator)
        return cut(network.net, plan), plan
    first = random_plan(network.net, generator, ranks=False)
    between = cut(network.net, first)
    second = random_plan(between, generator)
    return cut(between, second), combine(network.net, first, second)


@torch.no_grad()
def difference(compact: nn.Module, twin: nn.Module, image: Tensor) -> float:
    """Return how far logits are from those of the masked network, relative to the largest."""
    expected = twin(image)
    return float((compact(image) - expected).abs().max() / expected.abs().max())


def is_rounding(network: Network, plan: Plan) -> bool:
    """Whether the cut network and its masked twin agree in float64."""
    dense, image = copy.deepcopy(network.net).double(), network.image.double()
    return difference(cut(dense, plan), masked(dense, plan), image) <= IN_FLOAT64


def is_counted(network: Network, compact: nn.Module, plan: Plan) -> bool:
    """Whether the counter, the closed formula and the parameters agree."""
    found, formula = count(compact, network.cost.input_size), network.cost.plan(plan)
    there = sum(tensor.numel() for tensor in compact.parameters())
    return found[:2] == formula[:2] and found.params == there


def shares(cases: int, families: Sequence[str]) -> dict[str, int]:
    """Return how many plans each family gets, `cases` in all."""
    weights = {name: 0.03 if name in LARGEST else 0.15 if name in LARGE else 1 for name in families}
    ends, total = list(accumulate(weights.values())), sum(weights.values())
    whole = [round(cases * end / total) for end in (0, *ends)]
    return {name: b - a for name, (a, b) in zip(families, pairwise(whole), strict=True)}


def check(cases: int, seed: int, families: Sequence[str] = ()) -> Found:
    """Try so many plans, shared out among the families, and print those that fail."""
    names = [*families] or [name for name in NETWORKS if timm.is_model(NETWORKS[name][0])]
    found = Found(counts=Counter(kills=0, lost=0, different=0, wrong_counts=0, cases=0))
    for family, n in shares(cases, names).items():
        if not n:
            continue
        network = made(family)
        found.counts["families"] += 1
        for number in range(n):
            generator = random.Random(f"{seed} {family} {number}")
            compact, plan = _case(network, generator)
            error = difference(compact, masked(network.net, plan), network.image)
            rounded = error > TOLERANCE and is_rounding(network, plan)
            wrong = not (error <= TOLERANCE or rounded)
            counted = is_counted(network, compact, plan)
            found.counts["cases"] += 1
            found.counts["without_effect"] += bool(plan.edits) and network.is_unchanged(compact)
            found.counts["different"] += wrong
            found.counts["rounding"] += rounded
            found.counts["wrong_counts"] += not counted
            if not error <= found.largest:
                found.largest, found.worst = error, family
            if wrong or rounded or not counted:
                print(f"  {family}, case {number}: off by {error:.1e}, counted {counted}")
            if wrong or not counted:
                print(f"    {' '.join(dumps(plan).split())[:2000]}", flush=True)
    return found


def main() -> None:
    """Try as many plans as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.cuts", description=__doc__)
    parser.add_argument("--cases", type=int, default=50_000, help="plans in all (50,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", choices=NETWORKS, default=())
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = check(chosen.cases, chosen.seed, chosen.families)
    print(", ".join(f"{key} {value}" for key, value in found.row().items()))
    sys.exit(bool(found.counts["different"] or found.counts["wrong_counts"]))


if __name__ == "__main__":
    main()

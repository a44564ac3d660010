"""How well joint compression predicts losses: `python -m tests.predicted [--images 1000]`.

Random plans of ViT-Ti, cut and folded, are measured on images that were not scored: the KL
divergence from the dense network against the sum of the losses of what went.
"""

from __future__ import annotations

import argparse
import math
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import spearmanr
from timm.data import create_transform
from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.cli.compose import CONF
from vitrim.method.joint.allocation import Losses
from vitrim.method.joint.evidence import compensated, losses_of
from vitrim.method.joint.method import Joint
from vitrim.network import structure
from vitrim.network.surgery import cut
from vitrim.plan import Evidence, Plan
from vitrim.sensitivity.parts import parts_of

DATA = Path(__file__).parents[2] / "shared" / "data"
NAME = "vit_tiny_patch16_224"


def main() -> None:
    """Print the rank correlation and draw the scatter."""
    parser = argparse.ArgumentParser(prog="python -m tests.predicted", description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="that are scored")
    parser.add_argument("--plans", type=int, default=40)
    parser.add_argument("--measured", type=int, default=64, help="images of each measurement")
    parser.add_argument("--png", default="predicted.png")
    options = parser.parse_args()
    net = timm.create_model(NAME).eval()
    net.load_state_dict(load_file(DATA / f"{NAME}.safetensors"))
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=["method=joint", "model=vit_tiny"])
    method: Joint = instantiate(cfg.method, _convert_="all")
    scorer = method.scorer(net)
    for batch in batches("train", options.images):
        scorer.observe(batch)
    scorer.conclude()
    evidence = scorer.evidence()
    x = torch.cat([*batches("val", options.measured)])
    dense = decision(net, x)
    rows = [random_plan(method, net, evidence, x, dense, seed) for seed in range(options.plans)]
    for kept, predicted, measured in rows:
        print(f"{kept:7.2%} of the MACs: predicted {predicted:.4f}, measured {measured:.4f}")
    correlation = spearmanr([row[1] for row in rows], [row[2] for row in rows])[0]
    print(f"rank correlation over {len(rows)} random plans: {correlation:.3f}")
    picture = Figure(figsize=(4.5, 4), layout="constrained")
    axes = picture.subplots()
    axes.loglog([row[1] for row in rows], [row[2] for row in rows], "o", markersize=4)
    limits = [min(min(row[1:]) for row in rows), max(max(row[1:]) for row in rows)]
    axes.loglog(limits, limits, color="grey", linewidth=0.8)
    axes.set(xlabel="predicted KL (nats)", ylabel="measured KL (nats)")
    axes.set_title(f"{len(rows)} random plans, rank correlation {correlation:.2f}", fontsize=10)
    picture.savefig(options.png, dpi=150)


@torch.no_grad()
def decision(net: nn.Module, x: Tensor) -> Tensor:
    """Return the logarithms of the probabilities at temperature 2, (B, classes)."""
    return torch.cat([(net(chunk) / 2).log_softmax(1) for chunk in x.split(16)])


def random_plan(
    method: Joint, net: nn.Module, evidence: Evidence, x: Tensor, dense: Tensor, seed: int
) -> tuple[float, float, float]:
    """Return the share of the MACs, the predicted and the measured loss of a random plan.

    The losses of each site are multiplied by a random factor before what goes is chosen. `dense` is
    the decision of the dense network for the images x.
    """
    generator = torch.Generator().manual_seed(seed)
    cost, losses = Cost(net, (224, 224)), losses_of(parts_of(net, method.edits), evidence)

    def factor() -> float:
        return math.exp(float(torch.randn((), generator=generator)))

    distorted = Evidence(
        scores={name: losses.units[name] * factor() for name in losses.units},
        moments=evidence.moments,
    )
    keep = 0.5 + 0.45 * float(torch.rand((), generator=generator))
    proposal = method.plan(net, distorted, cost, Target(metric="macs", keep=keep))
    plan = Plan(model={}, edits=proposal.edits)
    compact = cut(compensated(net, structure(net), plan, evidence, method.ridges.fold), plan)
    measured = float((dense.exp() * (dense - decision(compact, x))).sum(1).mean())
    return cost.plan(plan).macs / cost.dense_count.macs, predicted_loss(losses, plan), measured


def predicted_loss(losses: Losses, plan: Plan) -> float:
    """Return the sum of the losses of what a plan removes."""
    total = sum(losses.branches[edit.branch] for edit in plan.drops())
    for keep in plan.keeps():
        of_site = losses.units[keep.site]
        total += float(of_site.sum() - of_site[list(keep.index)].sum())
    return total


def batches(split: str, n: int) -> Iterator[Tensor]:
    """Iterate over batches of up to 16 images (B, C, H, W), evenly drawn from the tar file."""
    cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
    transform = create_transform(224, is_training=False, **cfg)
    with tempfile.TemporaryDirectory() as folder, tarfile.open(DATA / "imagenet_mini.tar") as tar:
        members = [m for m in tar.getmembers() if m.isfile() and f"{split}/" in m.name]
        chosen = members[:: max(1, len(members) // n)][:n]
        tar.extractall(folder, chosen, filter="data")
        images = [transform(Image.open(Path(folder) / m.name).convert("RGB")) for m in chosen]
        for start in range(0, len(images), 16):
            yield torch.stack(images[start : start + 16])


if __name__ == "__main__":
    main()

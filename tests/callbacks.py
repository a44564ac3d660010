"""`vitrim.Prune` in somebody else's LightningModule beside the command, on the digits.

    python -m tests.callbacks FOLDER SEED [SEED ...]

FOLDER keeps the dense network between calls: 20 epochs of vit_digits. Each row is a seed: top-1 of
the compact network right after the cut, of the command's gate training and of the callback's, with
the same network, recipe and target (experiment=demo with 10 epochs of gates, strength=3). The
callback's trainer draws its images by a seed of its own.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

import vitrim
from vitrim.api.settings import build_method
from vitrim.budget.cost import Cost
from vitrim.budget.target import resolve_target
from vitrim.data import ImageSpec
from vitrim.data.digits import Digits
from vitrim.files import digest
from vitrim.method import TrainsGates
from vitrim.prune import Slicing
from vitrim.trainer.classify import Classify
from vitrim.trainer.phases import PhaseRunner
from vitrim.trainer.recipe import Recipe, adamw_cosine
from vitrim.trainer.resume import Resume
from vitrim.trainer.tracking import Tracker

SPEC = ImageSpec(
    channels=1, size=(8, 8), mean=(0.5,), std=(0.5,), interpolation="bilinear", crop_pct=1.0
)
DATA = Digits(batch_size=64, held_out=0.2, shift=0.25, rotation=5.0, label_smoothing=0.1)
ARGS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "class_token": False,
    "global_pool": "avg",
    "drop_path_rate": 0.1,
}
KEYS: dict[str, Any] = {"scope": "site", "even_heads": True, "gate_lr": 1e-2}
STRENGTH = 3.0
DENSE = Recipe(epochs=20, lr=2e-3, weight_decay=0.05, warmup_epochs=2, clip_norm=1.0)
GATES = Recipe(epochs=10, lr=1e-3, weight_decay=0.05, warmup_epochs=1, clip_norm=1.0)
TRAINER = partial(
    Trainer,
    accelerator="cpu",
    devices=1,
    enable_model_summary=False,
    num_sanity_val_steps=0,
    check_val_every_n_epoch=1000,
)


class Own(LightningModule):
    """A module of somebody who trains by the command's recipe and knows nothing of vitrim."""

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.net = net.train()
        self.recipe = recipe

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        return adamw_cosine(self.net, self.recipe, self.trainer)


def runner(folder: Path, seed: int = 0) -> PhaseRunner:
    """Return what runs the command's phases in `folder`."""
    return PhaseRunner(
        trainer=TRAINER,
        data=DATA.module(SPEC),
        tracker=Tracker(folder, "none", group="", config={}),
        folder=folder,
        shared=folder,
        seed=seed,
        progress=False,
        checkpoint_minutes=60,
        batchnorm_images=32,
    )


def dense(folder: Path, recipe: Recipe = DENSE) -> nn.Module:
    """Return the dense network, trained in `folder` unless it is there."""
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", **ARGS)
    phase = Classify(net, recipe=recipe, n_classes=10)
    runner(folder).run_or_load(folder / f"dense-{recipe.epochs}", phase, name="dense")
    return net.eval()


def by_the_command(net: nn.Module, folder: Path, seed: int, recipe: Recipe = GATES) -> Slicing:
    """Train gates and slice as the command does in a run with this seed."""
    settings = {**KEYS, "gating": asdict(recipe)}
    method = build_method("vtp", settings, seed=seed)
    assert isinstance(method, TrainsGates)
    target = resolve_target(
        STRENGTH, {}, levels=method.levels, metric=method.metric, where="method=vtp"
    )
    net = copy.deepcopy(net)
    slicing = Slicing(method, Cost(net, SPEC.size), target, name="vtp")
    scorer = method.scorer(net)
    phase = f"score-{recipe.epochs}-{seed}"
    runner(folder, seed).run_or_load(folder / phase, scorer, name="score", callbacks=[slicing])
    return slicing


def by_the_callback(
    net: nn.Module, seed: int, recipe: Recipe = GATES, *, same_draws: bool = False
) -> vitrim.Prune:
    """Train gates and slice with `vitrim.Prune`; `same_draws`: with the command's images."""
    seed = int(digest([seed, "score"]), 16) if same_draws else seed
    seed_everything(seed, workers=True, verbose=False)
    data = DATA.module(SPEC)
    data.seed = seed
    prune = vitrim.Prune(strength=STRENGTH, **KEYS)
    draws = [Resume(None, seed=seed, minutes=60, resumes_at="never")] if same_draws else []
    trainer = TRAINER(
        max_epochs=recipe.epochs,
        callbacks=[prune, *draws],
        gradient_clip_val=recipe.clip_norm,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=same_draws,
        use_distributed_sampler=False,
    )
    trainer.fit(Own(copy.deepcopy(net), recipe), datamodule=data)
    return prune


@cache
def _held_out() -> tuple[Tensor, Tensor]:
    images, labels = zip(*DATA.module(SPEC).val_set, strict=True)
    return torch.stack(images), torch.stack(labels)


@torch.no_grad()
def top1(net: nn.Module) -> float:
    """Return the accuracy of a network on the 360 held-out digits, in percent."""
    images, labels = _held_out()
    hits = copy.deepcopy(net).eval()(images).argmax(-1) == labels
    return 100 * hits.double().mean().item()


def row(folder: Path, net: nn.Module, seed: int) -> tuple[float, float]:
    """Return top-1 right after the cut: the command's and the callback's, at equal counts."""
    command, callback = by_the_command(net, folder, seed), by_the_callback(net, seed)
    assert vitrim.count(command.compact, 8) == vitrim.count(callback.compact, 8)
    return top1(command.compact), top1(callback.compact)


def main(folder: Path, seeds: list[int]) -> None:
    """Print a row per seed."""
    net = dense(folder)
    print(f"dense {top1(net):.1f}", flush=True)
    for seed in seeds:
        command, callback = row(folder, net, seed)
        print(f"seed {seed}: command {command:.1f}, callback {callback:.1f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [*map(int, sys.argv[2:])])

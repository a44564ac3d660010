"""DC-ViT, Table 9: one iteration of making synthetic images, and one of training a trial.

The paper measured on an RTX 3090. It says that the synthetic set takes less than a tenth of one
fine-tuning; whether that is so follows from both times and the iterations of its code: 2000 for the
images; 2000 epochs of batches of 64 for a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from vitrim.method.dcvit.evaluation import features_of
from vitrim.method.dcvit.settings import DCViTTuning
from vitrim.method.dcvit.synthetic import PixelRange, SyntheticImages
from vitrim.method.dcvit.trial_training import TrialRecipe, TrialTraining
from vitrim.network import structure
from vitrim.network.surgery import cut
from vitrim.network.timing import clock_of
from vitrim.plan import Drop, Keep, Plan
from vitrim.trainer.mimic import FeatureLoss, frozen_parameters
from vitrim.trainer.recipe import Recipe

from .planning import method_of
from .scale import Finding, Scale

ITERATIONS, EPOCHS, BATCH = 2000, 2000, 64
SHARE = 0.1
RECIPE = Recipe(epochs=EPOCHS, lr=3e-5, weight_decay=1e-4, warmup_epochs=20, clip_norm=1.0)


def findings(scale: Scale) -> Iterator[Finding]:
    """Measure both iterations in fp32, as the paper does, and compare the whole times."""
    net = scale.net().eval()
    made = _per_iteration(scale, lambda n: _make(scale, net, n))
    yield Finding(f"Table 9: an iteration of {scale.synthetic} images", f"{made:.1f} ms")
    trained = _per_iteration(scale, lambda n: _train(scale, net, n))
    batch = min(BATCH, scale.batch)
    yield Finding(f"Table 9: an iteration of a trial, batch {batch}", f"{trained:.1f} ms")
    for samples in (50, 500):
        steps = EPOCHS * -(-samples // BATCH)
        share = ITERATIONS * made / (steps * trained)
        yield Finding(
            f"Table 9: all images over one fine-tuning on {samples}",
            f"{share:.2f}",
            f"< {SHARE:g}" if samples == 500 else "",
            share < SHARE if samples == 500 else None,
        )


def _per_iteration(scale: Scale, work: Callable[[int], None]) -> float:
    """Return the milliseconds of an iteration: a long run less a short one."""
    elapsed = []
    for n in (1, 1, 1 + scale.iterations):  # the first warms up
        stop = clock_of(scale.device).start()
        work(n)
        elapsed.append(stop()())
    return max(elapsed[2] - elapsed[1], 1e-3) / scale.iterations


def _make(scale: Scale, net: nn.Module, n: int) -> None:
    images: SyntheticImages = method_of("dcvit", scale.name).synthetic
    pixels = PixelRange.of(scale.images(2))
    side = scale.side
    short = replace(images, images=scale.synthetic, iterations=n, jitter=min(30, side // 8))
    short.run(net, n_classes=scale.n_classes, pixels=pixels, size=(side, side))


def _train(scale: Scale, net: nn.Module, n: int) -> None:
    """Train a trial of the block in the middle: without attention, with half of its units."""
    tuning: DCViTTuning = method_of("dcvit", scale.name).tuning
    blocks = len(net.blocks)  # type: ignore[arg-type]
    block = f"blocks.{blocks // 2}"
    hidden = structure(net).sites[f"{block}.mlp.hidden"].size
    keep = Keep(site=f"{block}.mlp.hidden", index=tuple(range(0, hidden, 2)))
    compact = cut(net, Plan(model={}, edits=(Drop(branch=f"{block}.attn"), keep)))
    recipe = TrialRecipe(
        training=RECIPE, views="plain", loss=FeatureLoss(), freeze_tail=tuning.freeze_tail
    )
    frozen = frozen_parameters(compact, [block], freeze_tail=tuning.freeze_tail)
    training = TrialTraining(compact, net, recipe, frozen=frozen, steps=EPOCHS)
    images = scale.images(min(BATCH, scale.batch))
    for _ in range(n):
        training.step(images, features_of(net, images), torch.Tensor.backward)

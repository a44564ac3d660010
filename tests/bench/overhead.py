"""Training on the digits through Lightning, with all that a run does, against a bare loop."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning import Callback
from torch import nn

from vitrim.data import ImageSpec, Loaders
from vitrim.data.digits import Digits
from vitrim.trainer.classify import Classify
from vitrim.trainer.recipe import Recipe, optimizer_and_schedule

from .resume import phases_in
from .timing import Row

EPOCHS = 4
RECIPE = Recipe(epochs=EPOCHS, lr=1e-3, weight_decay=0.05, warmup_epochs=1, clip_norm=1.0)
SPEC = ImageSpec(
    channels=1, size=(8, 8), mean=(0.3,), std=(0.4,), interpolation="bicubic", crop_pct=1.0
)
DIGITS = Digits(batch_size=64, held_out=0.2, shift=0.25, rotation=5.0, label_smoothing=0.1)


def rows(repeats: int) -> list[Row]:
    """Return what an epoch takes over that of the bare loop, on the same batches.

    The first epoch of each is not timed. Validation is not part of it: neither does any.
    """
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for turn in range(2 * repeats):
        sides = {"ours": _ours, "bare": _bare}
        for name in [*sides][:: -1 if turn % 2 else 1]:
            seconds[name].append(sides[name]())
    return [
        Row(
            name="digits, an epoch",
            peer="a bare loop",
            ours_s=seconds["ours"],
            peer_s=seconds["bare"],
            kind="cost",
            limit=1.10,
        )
    ]


class _Watch(Callback):
    """Notes when epochs begin."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self.began.append(time.perf_counter())

    def on_train_end(self, *args: Any) -> None:
        self.began.append(time.perf_counter())


def _ours() -> float:
    """Return the seconds of an epoch of a phase, as a run trains it."""
    watch = _Watch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runner = phases_in(
            folder, _data(), checkpoint_minutes=10.0, batchnorm_images=0, evaluates=False
        )
        phase = Classify(_net(), recipe=RECIPE, n_classes=10)
        runner.run_or_load(folder / "dense", phase, name="dense", callbacks=[watch])
    return (watch.began[-1] - watch.began[1]) / (EPOCHS - 1)


def _bare() -> float:
    """Return the seconds of an epoch of the same steps on the same batches."""
    data, net = _data(), _net().train()
    loader: Any = data.train_dataloader()
    optimizer, schedule = optimizer_and_schedule(net, RECIPE, steps=EPOCHS * len(loader))
    began = 0.0
    for epoch in range(EPOCHS):
        loader.batch_sampler.set_epoch(epoch)
        if epoch == 1:
            began = time.perf_counter()
        for images, targets in loader:
            loss = F.cross_entropy(net(images), targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), RECIPE.clip_norm)
            optimizer.step()
            schedule.step()
    return (time.perf_counter() - began) / (EPOCHS - 1)


def _data() -> Loaders:
    data = DIGITS.module(SPEC)
    data.seed = 0
    return data


def _net() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        in_chans=1,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=10,
    )

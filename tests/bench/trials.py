"""Trials of dense compression: a step towards kept features against the naive loop; quick trials.

With the real ViT-Ti and images where they are at hand (tests/test_real.py), else with random ones,
on which the two kinds of trials need not agree. About five minutes on one core.
"""

from __future__ import annotations

import copy
import io
import logging
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from vitrim.data import Loaders
from vitrim.data.imagefolder import image_folder
from vitrim.method.dcvit.method import DCViT
from vitrim.method.dcvit.trial_training import TrialTraining, distill_step
from vitrim.network.surgery import cut
from vitrim.plan import Drop, Keep, Plan
from vitrim.trainer.mimic import frozen_parameters

from .loader import OFF, RECIPE, SPEC
from .scoring import method_of, net_of
from .timing import Row, Side, take_turns

DATA = Path(__file__).parents[3] / "shared" / "data"
NET = "vit_tiny_patch16_224"
BATCH = 16
STEPS = 2
EPOCHS = 20  # of a full trial; the paper's have 2000
FEW = 50
EPOCHS_IN_A_RUN = 3  # the first is not timed
CHOSEN = 3  # blocks, for the MACs of two
BLOCKS = (1, 5, 10)
"""The first, a middle and the last block of those that are tried."""


def rows(repeats: int) -> list[Row]:
    """Return the steps of trials in float32, with equal losses, and in bfloat16; quick trials."""
    teacher, images = _real()
    batches = [*images.split(BATCH)]
    with torch.no_grad():
        aims = [teacher.forward_features(x) for x in batches]  # type: ignore[operator]
    naive = {at: _naive(teacher, at, batches) for at in BLOCKS}
    ours = {at: _ours(teacher, at, batches, aims, nullcontext) for at in BLOCKS}
    half = {at: _ours(_plain(teacher), at, batches, aims, _bfloat16) for at in BLOCKS}
    for at in BLOCKS:
        for mine, theirs in zip(ours[at](), naive[at](), strict=True):
            assert abs(mine - theirs) <= 1e-6 * abs(theirs), (at, mine, theirs)
    turns = max(1, repeats // 2)
    sides = {
        name: Side(work=lambda _, loops=loops: [loop() for loop in loops.values()])
        for name, loops in (("naive", naive), ("float32", ours), ("bfloat16", half))
    }
    seconds = take_turns(sides, turns)
    return [
        _row("float32, losses equal to 1e-6", seconds["float32"], seconds["naive"], 1.5),
        _row("bfloat16", seconds["bfloat16"], seconds["naive"], 2.8),
        _quick(teacher, batches[0][:8]),
        _in_a_run(teacher, turns),
    ]


def _in_a_run(teacher: nn.Module, turns: int) -> Row:
    """Return the epochs of a trial in a run on 50 JPEGs against the steps within them."""
    method: DCViT = method_of("dcvit", NET)
    training = replace(method.trial.training, epochs=EPOCHS_IN_A_RUN)
    method = replace(method, trial=replace(method.trial, training=training, views="plain"))
    clocks = [_Clock() for _ in range(turns)]
    with tempfile.TemporaryDirectory() as name:
        loaders = _few_jpegs(Path(name))
        for clock in clocks:
            phase = method.scorer(teacher)
            phase.groups, phase.epochs = phase.groups[:1], 1 + EPOCHS_IN_A_RUN
            trainer = Trainer(
                accelerator="cpu",
                max_epochs=phase.epochs,
                callbacks=[clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=1,
            )
            trainer.fit(phase.train(), loaders.calibration_dataloader(FEW, 0))
    return Row(
        name=f"{EPOCHS_IN_A_RUN - 1} epochs of a trial of ViT-Ti in a run on {FEW} JPEGs",
        peer="the steps in them, on tensors in memory",
        ours_s=[clock.seconds for clock in clocks],
        peer_s=[clock.in_steps for clock in clocks],
        kind="cost",
        limit=1.05,
    )


class _Clock(Callback):
    """Measures the epochs of a trial after its first, and what of them its steps take."""

    seconds = in_steps = begun = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: object
    ) -> None:
        trial = pl_module._trial
        if trainer.current_epoch == 1:  # of one batch
            assert isinstance(trial, TrialTraining)
            trial.step = partial(self._step, trial.step)  # type: ignore[method-assign]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.begun, self.in_steps = time.perf_counter(), 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.current_epoch == EPOCHS_IN_A_RUN:  # before the trial is evaluated
            self.seconds = time.perf_counter() - self.begun

    def _step(self, step: Callable[..., Tensor], *args: Any) -> Tensor:
        begun = time.perf_counter()
        loss = step(*args)
        self.in_steps += time.perf_counter() - begun
        return loss


def _few_jpegs(root: Path) -> Loaders:
    """Return loaders of 50 smooth JPEGs of 500 x 375 pixels, in few batches."""
    generator = torch.Generator().manual_seed(0)
    for index in range(FEW):
        folder = root / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = torch.rand(1, 3, 24, 32, generator=generator)
        pixels = F.interpolate(noise, (375, 500), mode="bicubic")[0].clamp(0, 1).mul(255).byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{index}.jpg", quality=90)
    images = image_folder(
        root=str(root), train="train", val="train", classes=None, class_seed=0, samples=FEW,
        samples_seed=0, batch_size=FEW, workers=0, mixing=OFF,
        bad_images={"limit": 0, "evaluation": "fail"}, augmentation={**RECIPE, "backend": "pil"},
    )  # fmt: skip
    return images.module(SPEC)


def _real() -> tuple[nn.Module, Tensor]:
    """Return ViT-Ti with real weights, and real images; random ones where those are not."""
    net, number = net_of(NET), BATCH * STEPS
    tar, weights = DATA / "imagenet_mini.tar", DATA / f"{NET}.safetensors"
    if not (tar.is_file() and weights.is_file()):
        return net, torch.randn(number, 3, 224, 224)
    net.load_state_dict(safetensors.torch.load_file(weights))
    prepare = create_transform(**resolve_data_config({}, model=net))
    with tarfile.open(tar) as archive:
        names = sorted(name for name in archive.getnames() if name.endswith((".jpg", ".JPEG")))
        files = [archive.extractfile(name) for name in names[:: len(names) // number][:number]]
        found = [prepare(Image.open(io.BytesIO(f.read())).convert("RGB")) for f in files if f]
    return net, torch.stack(found)


def _plain(net: nn.Module) -> nn.Module:
    """Return a copy whose attentions are plain products, which are faster in bfloat16 here."""
    found = copy.deepcopy(net)
    for block in found.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False  # type: ignore[union-attr]
    return found


def _quick(net: nn.Module, images: Tensor) -> Row:
    """Return the ranking by least squares against that by trials that train, and its choice."""
    method: DCViT = method_of("dcvit", NET)
    long = replace(method.trial, training=replace(method.trial.training, epochs=EPOCHS))
    for chatty in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    data = TensorDataset(images, torch.zeros(len(images)))
    scores: dict[str, Tensor] = {}

    def ranked(name: str, how: DCViT) -> None:
        phase = how.scorer(net)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=phase.epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(phase.train(), DataLoader(data, batch_size=len(images)))
        scores[name] = torch.tensor([*phase.evidence().block_scores.values()])

    quick = take_turns({"ours": Side(work=lambda _: ranked("quick", method))}, 1)["ours"]
    start = time.perf_counter()
    ranked("full", replace(method, trial=long))
    full = time.perf_counter() - start
    chosen = [{*found.argsort(stable=True)[:CHOSEN].tolist()} for found in scores.values()]
    return Row(
        name=f"rank {len(scores['full'])} blocks by least squares: {len(chosen[0] & chosen[1])} of "
        f"the {CHOSEN} chosen are the trials'",
        peer=f"trials of {EPOCHS} epochs, {len(images)} images",
        ours_s=quick,
        peer_s=[full],
        kind="faster",
        limit=30.0,
    )


def _row(what: str, ours_s: list[float], naive_s: list[float], limit: float) -> Row:
    return Row(
        name=f"trials of blocks 1, 5 and 10 of ViT-Ti, {what}",
        peer="teacher in every step, full backward, float32",
        ours_s=ours_s,
        peer_s=naive_s,
        kind="faster",
        limit=limit,
    )


def _bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def _candidate(teacher: nn.Module, at: int) -> nn.Module:
    hidden = Keep(site=f"blocks.{at}.mlp.hidden", index=tuple(range(0, 768, 2)))
    plan = Plan(model={}, edits=(Drop(branch=f"blocks.{at}.attn"), hidden))
    return cut(teacher, plan).train()


def _ours(
    teacher: nn.Module,
    at: int,
    batches: list[Tensor],
    aims: list[Tensor],
    precision: Callable[[], AbstractContextManager[Any]],
) -> Callable[[], list[float]]:
    def loop() -> list[float]:
        net = _candidate(teacher, at)
        fixed = frozen_parameters(net, [f"blocks.{at}"], freeze_tail=True)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name not in fixed)
        trained = [tensor for tensor in net.parameters() if tensor.requires_grad]
        optimizer, losses = AdamW(trained, lr=1e-4), []
        for x, aim in zip(batches, aims, strict=True):
            with precision():
                losses.append(
                    distill_step(net, x, aim, optimizer, 0.0, torch.Tensor.backward).item()
                )
        return losses

    return loop


def _naive(teacher: nn.Module, at: int, batches: list[Tensor]) -> Callable[[], list[float]]:
    teacher = copy.deepcopy(teacher)

    def loop() -> list[float]:
        net = _candidate(teacher, at)
        fixed = frozen_parameters(net, [f"blocks.{at}"], freeze_tail=True)
        trained = [tensor for name, tensor in net.named_parameters() if name not in fixed]
        optimizer, losses = AdamW(trained, lr=1e-4), []
        for x in batches:
            with torch.no_grad():
                aim = teacher.forward_features(x)  # type: ignore[operator]
            loss = (net.forward_features(x) - aim).square().mean()  # type: ignore[operator]
            net.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        return losses

    return loop

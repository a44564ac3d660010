"""A phase stopped anywhere ends as one that was not, to the bit; damaged checkpoints are found."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor, nn

from conftest import small_net
from vitrim.data import ImageSpec
from vitrim.data.digits import Digits
from vitrim.files import StoreError
from vitrim.jobs import signals
from vitrim.jobs.signals import Preempted
from vitrim.method.dcvit.synthetic import Dream
from vitrim.method.dcvit.trials import Trials
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.classify import Classify
from vitrim.trainer.phases import Phases
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.resume import (
    GENERATIONS,
    STATE,
    DivergedError,
    SafeCheckpointIO,
    newest,
)
from vitrim.trainer.tracking import Tracker

SPEC = ImageSpec(
    channels=1, size=(8, 8), mean=(0.3,), std=(0.4,), interpolation="bicubic", crop_pct=1.0
)
RECIPE = Recipe(epochs=3, lr=1e-3, weight_decay=0.05, warmup_epochs=1, clip_norm=1.0)
STEPS = 5  # in an epoch
DIGITS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
DREAM = Dream(
    images=4, iterations=3, warmup=1, lr=0.2, jitter=1, smooth=1e-3, power=1.0, small=1e-3
)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    with signals.taken():
        yield


class At(Callback):
    """Does something when a step begins, counted from 1."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step = step
        self.action = action

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.step:
            self.action()


def phase() -> Classify:
    net = small_net(dtype=torch.float32, drop_rate=0.2, **DIGITS)
    return Classify(net, recipe=RECIPE, n_classes=10)


def phases(folder: Path, *, minutes: float = 60.0, batch_size: int = 256) -> Phases:
    folder.mkdir(parents=True, exist_ok=True)
    digits = Digits(
        batch_size=batch_size, held_out=0.2, shift=1.0, rotation=10.0, label_smoothing=0.1
    )
    return Phases(
        trainer=partial(
            Trainer,
            accelerator="cpu",
            devices=1,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=2,
            log_every_n_steps=5,
        ),
        data=digits.module(SPEC),
        tracker=Tracker(folder, "none", group="", config={}),
        folder=folder,
        shared=folder,
        seed=0,
        progress=False,
        checkpoint_minutes=minutes,
    )


def trained(folder: Path, *callbacks: Callback, minutes: float = 60.0) -> list[Tensor]:
    module = phase()
    phases(folder, minutes=minutes).once(folder / "x", module, name="x", callbacks=callbacks)
    return [*module.net.parameters()]


def killed() -> None:
    raise SystemError("as a kill would: nothing is saved")


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return trained(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", [1, 3, STEPS, STEPS + 1, 2 * STEPS, 3 * STEPS])
def test_stopped_at_any_step_the_weights_end_the_same(
    step: int, uninterrupted: list[Tensor], tmp_path: Path
) -> None:
    stop = partial(os.kill, os.getpid(), random.Random(step).choice([*signals.CODES]))
    with pytest.raises(Preempted), signals.taken():
        trained(tmp_path, At(step, stop))
    assert len([*(tmp_path / "x" / "checkpoints").iterdir()]) == 1
    assert equal(trained(tmp_path), uninterrupted)
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_killed_at_every_other_step_the_weights_end_the_same(
    uninterrupted: list[Tensor], tmp_path: Path
) -> None:
    for step in range(2, 3 * STEPS, 3):
        with pytest.raises(SystemError):
            trained(tmp_path, At(step, killed), minutes=0.0)
    assert len([*(tmp_path / "x" / "checkpoints").iterdir()]) == GENERATIONS
    assert equal(trained(tmp_path), uninterrupted)


def tried(folder: Path, metric_set: Dream | None, *callbacks: Callback) -> dict[str, Tensor]:
    """Train trials of two blocks, two epochs each; return scores, moments and the best weights."""
    trials = Trials(
        small_net(dtype=torch.float32, depth=3, proj_drop_rate=0.2, **DIGITS),
        groups=[("blocks.0",), ("blocks.1",)],
        sampling=Sampling(images=8 * STEPS, tokens=4, readout=1.0),
        reuse="surgeon",
        regression=True,
        ridges=(1e-3, 1e-6),
        width=0.5,
        recipe=replace(RECIPE, epochs=2),
        front=True,
        metric_set=metric_set,
        distance="kl",
        seed=0,
    )
    phases(folder, minutes=0.0, batch_size=8).once(
        folder / "x", trials, name="x", callbacks=callbacks
    )
    return trials.state_dict()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and equal([*one.values()], [*two.values()])


@pytest.fixture(scope="module", params=[None, DREAM], ids=["images", "dreams"])
def trials(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Dream | None, dict[str, Tensor]]:
    ended = tried(tmp_path_factory.mktemp("trials"), request.param)
    assert ended["_scores"].shape == (2,)
    assert ended["_candidate"].numel() > 1000
    return request.param, ended


@pytest.mark.parametrize("step", [STEPS, 2 * STEPS, 2 * STEPS + 3, 3 * STEPS])
def test_trials_stopped_anywhere_end_the_same(
    step: int, trials: tuple[Dream | None, dict[str, Tensor]], tmp_path: Path
) -> None:
    metric_set, ended = trials
    with pytest.raises(Preempted), signals.taken():
        tried(tmp_path, metric_set, At(step, partial(os.kill, os.getpid(), signal.SIGTERM)))
    saved = [int(at.name) for at in sorted((tmp_path / "x").glob("checkpoints/*"))]
    epochs = step // STEPS
    assert saved == [STEPS * n for n in (epochs - 1, epochs) if n > 0]
    over = At(1, partial(pytest.fail, "started over"))
    assert same(tried(tmp_path, metric_set, over), ended)


def test_trials_killed_again_and_again_end_the_same(
    trials: tuple[Dream | None, dict[str, Tensor]], tmp_path: Path
) -> None:
    metric_set, ended = trials
    for step in (7, 13, 20):
        with pytest.raises(SystemError):
            tried(tmp_path, metric_set, At(step, killed))
    assert same(tried(tmp_path, metric_set), ended)


def test_without_a_checkpoint_the_phase_starts_over(
    uninterrupted: list[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(SystemError):
        trained(tmp_path, At(7, killed))
    assert equal(trained(tmp_path), uninterrupted)


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "empty"])
def test_a_damaged_checkpoint_is_found_and_the_older_one_taken(
    damage: str, uninterrupted: list[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(SystemError):
        trained(tmp_path, At(8, killed), minutes=0.0)
    older, newer = sorted((tmp_path / "x" / "checkpoints").iterdir())
    content = bytearray((newer / STATE).read_bytes())
    match damage:
        case "flip":
            content[len(content) // 2] ^= 1
            (newer / STATE).write_bytes(content)
        case "truncate":
            (newer / STATE).write_bytes(content[: len(content) // 2])
        case "no manifest":
            (newer / "manifest.json").unlink()
        case "empty":
            for file in newer.iterdir():
                file.unlink()
    (older / ".state.ckpt.left-by-a-kill").write_bytes(b"half")
    assert newest(tmp_path / "x" / "checkpoints") == older
    assert [path.name for path in older.glob(".*")] == []
    assert equal(trained(tmp_path), uninterrupted)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    uninterrupted: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    assert equal(trained(tmp_path, minutes=0.0), uninterrupted)
    assert "checkpoint not saved" in caplog.text


def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    module = phase()

    def spoil() -> None:
        with torch.no_grad():
            next(module.net.parameters()).fill_(torch.nan)

    with pytest.raises(DivergedError, match=r"epoch 1, batch 1.*learning rate"):
        phases(tmp_path, minutes=0.0).once(
            tmp_path / "x", module, name="x", callbacks=[At(STEPS + 2, spoil)]
        )
    kept = newest(tmp_path / "x" / "checkpoints")
    assert kept is not None
    assert int(kept.name) == STEPS + 1


def test_a_phase_that_cannot_be_saved_within_starts_over(tmp_path: Path) -> None:
    class Once(Classify):
        resumes_at = "never"

    module = Once(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), recipe=RECIPE, n_classes=10)
    with pytest.raises(SystemError):
        phases(tmp_path, minutes=0.0).once(
            tmp_path / "x", module, name="x", callbacks=[At(3, killed)]
        )
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_checkpoints_are_neither_fetched_nor_unpickled(tmp_path: Path) -> None:
    io = SafeCheckpointIO()
    with pytest.raises(StoreError, match="not from addresses"):
        io.load_checkpoint("http://127.0.0.1/state.ckpt")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path / 'canary'}",))

    io.save_checkpoint({"state_dict": Evil()}, tmp_path / "1")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        io.load_checkpoint(tmp_path / "1")
    assert not (tmp_path / "canary").exists()


def test_what_is_sent_is_what_is_read(tmp_path: Path) -> None:
    io = SafeCheckpointIO()
    sent = {"state_dict": {"a": torch.randn(3)}, "epoch": 2, "loops": {"b": [1, None, "c"]}}
    io.save_checkpoint(sent, tmp_path / "1")
    found = io.load_checkpoint(tmp_path / "1")
    assert torch.equal(found["state_dict"]["a"], sent["state_dict"]["a"])
    assert found["loops"] == sent["loops"]
    io.remove_checkpoint(tmp_path / "1")
    assert not (tmp_path / "1").exists()


def test_a_second_interrupt_does_not_wait() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert signals.noted() == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_process_whose_parent_is_gone_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signals.PARENT, str(os.getppid()))
    assert signals.noted() is None
    monkeypatch.setenv(signals.PARENT, str(os.getpid()))  # which is nobody's own parent
    with pytest.raises(Preempted, match="SIGTERM") as caught:
        signals.check()
    assert caught.value.code == 143

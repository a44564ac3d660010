"""A phase stopped anywhere ends as one that was not, to the bit; damaged checkpoints are found."""

import os
import random
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule
from torch import Tensor, nn

from nets import small_net
from phase_runner import DIGITS, At, killed, runner, stop
from vitrim.files import StoreError
from vitrim.jobs import signals
from vitrim.jobs.signals import Preempted
from vitrim.plan import Evidence
from vitrim.trainer.classify import Classify
from vitrim.trainer.phase import ResumePoint, check_scorer
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.resume import (
    GENERATIONS,
    STATE,
    DivergedError,
    SafeCheckpointIO,
    newest,
)

RECIPE = Recipe(epochs=3, lr=1e-3, weight_decay=0.05, warmup_epochs=1, clip_norm=1.0)
STEPS = 5  # in an epoch


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    with signals.handled():
        yield


def phase() -> Classify:
    net = small_net(dtype=torch.float32, drop_rate=0.2, **DIGITS)
    return Classify(net, recipe=RECIPE, n_classes=10)


def trained(folder: Path, *callbacks: Callback, minutes: float = 60.0) -> list[Tensor]:
    module = phase()
    runner(folder, minutes=minutes).run_or_load(folder / "x", module, name="x", callbacks=callbacks)
    return [*module.net.parameters()]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return trained(tmp_path_factory.mktemp("uninterrupted"))


@pytest.mark.parametrize("step", [1, 3, STEPS, STEPS + 1, 2 * STEPS, 3 * STEPS])
def test_stopped_at_any_step_the_weights_end_the_same(
    step: int, uninterrupted: list[Tensor], tmp_path: Path
) -> None:
    number = random.Random(step).choice([*signals.CODES])
    with pytest.raises(Preempted), signals.handled():
        trained(tmp_path, At(step, stop(number)))
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


class Sum(LightningModule):
    """A scorer that gathers in a plain attribute, as the protocol allows where it says "never"."""

    calibration_images = 8 * STEPS
    epochs = 2
    clip_norm = 0.0
    trains = False
    resumes_at: ResumePoint = "never"
    settings: Mapping[str, object] = {}

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(1, 1)
        self.register_buffer("total", torch.empty(0))
        self.seen: list[Tensor] = []

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        noise = torch.rand(len(batch[0]), 1, 1, 1)
        self.seen.append((batch[0] + noise).sum(0))

    def on_train_end(self) -> None:
        self.total = torch.stack(self.seen).sum(0)

    def evidence(self) -> Evidence:
        return Evidence(scores={"pixels": self.total})


def scored(folder: Path, *callbacks: Callback) -> Tensor:
    module = check_scorer(Sum())
    runner(folder, minutes=0.0, batch_size=8).run_or_load(
        folder / "x", module, name="x", callbacks=callbacks
    )
    return module.evidence().scores["pixels"]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return scored(tmp_path_factory.mktemp("evidence"))


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 1, 2 * STEPS])
def test_a_scorer_with_plain_attributes_stopped_anywhere_has_the_same_evidence(
    step: int, evidence: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(Preempted), signals.handled():
        scored(tmp_path, At(step, stop()))
    assert not (tmp_path / "x" / "manifest.json").exists()
    again = scored(tmp_path)
    assert again.shape == (1, 8, 8)
    assert torch.equal(again, evidence)
    assert torch.equal(scored(tmp_path, At(1, killed)), evidence)  # loaded, not run


def test_a_scorer_with_plain_attributes_killed_has_the_same_evidence(
    evidence: Tensor, tmp_path: Path
) -> None:
    for step in (2, STEPS + 1, 2 * STEPS):
        with pytest.raises(SystemError):
            scored(tmp_path, At(step, killed))
    assert torch.equal(scored(tmp_path), evidence)


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
        runner(tmp_path, minutes=0.0).run_or_load(
            tmp_path / "x", module, name="x", callbacks=[At(STEPS + 2, spoil)]
        )
    kept = newest(tmp_path / "x" / "checkpoints")
    assert kept is not None
    assert int(kept.name) == STEPS + 1


def test_a_phase_that_cannot_be_saved_within_starts_over(tmp_path: Path) -> None:
    class Once(Classify):
        resumes_at: ResumePoint = "never"

    module = Once(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), recipe=RECIPE, n_classes=10)
    with pytest.raises(SystemError):
        runner(tmp_path, minutes=0.0).run_or_load(
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
    assert signals.received() == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_process_whose_parent_is_gone_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signals.PARENT, str(os.getppid()))
    assert signals.received() is None
    monkeypatch.setenv(signals.PARENT, str(os.getpid()))  # which is nobody's own parent
    with pytest.raises(Preempted, match="SIGTERM") as caught:
        signals.raise_if_stopped()
    assert caught.value.code == 143

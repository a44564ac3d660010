"""Trials in two processes: each trains its share, and both end with what one process finds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from test_trials_resume import COMPRESSION, RECIPE, STEPS, SYNTHETIC, same
from torch import Tensor

from command import QUICK, Command
from fresh import together
from jobs.test_distributed import in_two_processes, of_torchrun
from nets import small_net
from phase_runner import DIGITS, At, runner, stop
from vitrim.deploy.runfolder import DIAGNOSTICS
from vitrim.errors import ConfigError
from vitrim.jobs import signals
from vitrim.jobs.distributed import process_group
from vitrim.method.dcvit.trial_training import TrialRecipe, TrialState, TrialTraining, Views
from vitrim.method.dcvit.trials import Trials
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import FeatureLoss
from vitrim.trainer.shares import own_state

N_CANDIDATES = 3
CANDIDATES = {
    "plain": [("blocks.1",), ("blocks.2",), ("blocks.3",)],
    "augmented": [("blocks.0",), ("blocks.1",), ("blocks.2",)],
}
"""So that the best trial is one time of the first process, and one time of the second."""
TWO = {"devices": 2, "strategy": "ddp"}
SCRIPT = """
import sys
sys.path.append({here!r})
import test_trials_shared as tests
tests.all_cases({folder!r})
"""


class Counted(TrialTraining):
    """Counts the trials of this process and its steps."""

    begun: int = 0
    steps: int = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        Counted.begun += 1

    def step(self, *args: Any, **options: Any) -> Tensor:
        """Count a step."""
        Counted.steps += 1
        return super().step(*args, **options)


def trials_of(views: Views) -> Trials:
    """Return three trials of two epochs each, with dropout and a rate for batches of 16."""
    return Trials(
        small_net(dtype=torch.float32, depth=4, proj_drop_rate=0.2, **DIGITS),
        groups=CANDIDATES[views],
        sampling=Sampling(images=8 * STEPS, tokens=4, class_token_weight=1.0),
        compression=COMPRESSION,
        recipe=TrialRecipe(
            training=replace(RECIPE, reference_batch=16),
            views=views,
            loss=FeatureLoss(1.0, 1.0),
            freeze_tail=True,
        ),
        synthetic=SYNTHETIC if views == "plain" else None,
        distance="kl",
    )


def tried(folder: Path, views: Views, *callbacks: Callback, **options: object) -> Trials:
    """Return the finished trials."""
    trials = trials_of(views)
    run = runner(folder, minutes=0.0, batch_size=8)
    run = replace(run, trainer=partial(run.trainer, **options))
    run.run_or_load(folder / "x", trials, name="x", callbacks=callbacks)
    return trials


def stopped(folder: Path, at: int, action: Callable[[], None]) -> None:
    """Stop augmented trials in a step, counted from 1."""
    with pytest.raises(signals.Preempted), signals.handled():
        tried(folder, "augmented", At(at, action), **TWO)


def all_cases(folder: str) -> None:
    """Run the trials in one of two processes, and save what it found and how much it trained."""
    place, rank = Path(folder), int(os.environ["RANK"])
    found: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch, process_group({"accelerator": "cpu", **TWO}):
        patch.setattr("vitrim.method.dcvit.trials.TrialTraining", Counted)
        for views in ("plain", "augmented"):
            Counted.begun = Counted.steps = 0
            trials = tried(place / views, views, **TWO)
            state = trials.state_dict()
            found[views] = (state, trials.epochs, Counted.begun, Counted.steps)
        action = stop() if rank else (lambda: None)
        stopped(place / "stopped", STEPS + 3, action)  # in the first epoch of both trials
        if rank == 0:
            shutil.copytree(place / "stopped", place / "other")
        stopped(place / "stopped", 3 * STEPS + 2, action)  # one process has no trial left
        found["resumed"] = tried(place / "stopped", "augmented", **TWO).state_dict()
    torch.save(found, place / f"found{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two processes have run all cases."""
    folder = tmp_path_factory.mktemp("shared")
    script = SCRIPT.format(here=str(Path(__file__).parent), folder=str(folder))
    in_two_processes(script, timeout=120)
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> list[dict[str, Any]]:
    """Return what each of two processes found."""
    return [torch.load(folder / f"found{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("views", ["plain", "augmented"])
def test_two_processes_find_what_one_does(
    views: Views, shared: list[dict[str, Any]], tmp_path: Path
) -> None:
    alone = tried(tmp_path, views)
    assert alone.epochs == 1 + N_CANDIDATES * RECIPE.epochs
    for found in shared:
        state, epochs, _, _ = found[views]
        assert epochs == 1 + 2 * RECIPE.epochs
        assert same(state, alone.state_dict())


@pytest.mark.parametrize("views", ["plain", "augmented"])
def test_each_trains_its_share_alone(views: Views, shared: list[dict[str, Any]]) -> None:
    for found, share in zip(shared, (2, 1), strict=True):
        _, _, begun, steps = found[views]
        assert begun == share
        assert steps == share * RECIPE.epochs * STEPS


def test_the_best_trial_may_be_of_either_process(shared: list[dict[str, Any]]) -> None:
    best = [int(shared[0][views][0]["best_position"]) for views in ("plain", "augmented")]
    assert {position % 2 for position in best} == {0, 1}


def test_another_number_of_processes_is_refused(folder: Path) -> None:
    newest = max((folder / "other" / "x").glob("checkpoints/*"))
    states = torch.load(newest / "state.ckpt")["trial"]
    assert [sorted(state) for state in states] == [["net", "optimizer", "schedule"]] * 2
    with pytest.raises(ConfigError, match="a run with processes=2"):
        tried(folder / "other", "augmented")


@pytest.mark.parametrize("saved", [None, {"net": {}, "optimizer": {}, "schedule": {}}])
def test_trials_that_were_not_shared_are_not_resumed_by_several(saved: TrialState | None) -> None:
    with pytest.raises(ConfigError, match="not shared out, and this run has 2 processes"):
        own_state(saved, rank=0, processes=2)
    assert own_state(saved, rank=0, processes=1) == saved
    assert own_state([None], rank=1, processes=2) is None  # refused later


def test_stopped_within_trials_both_go_on_with_their_own(shared: list[dict[str, Any]]) -> None:
    for found in shared:
        assert same(found["resumed"], found["augmented"][0])


def test_two_processes_plan_as_one_does(command: Command, tmp_path: Path) -> None:
    start = command(*QUICK, "strength=0").report.parent
    words = (
        *QUICK, f"model.checkpoint={start}", "method=dcvit", "target.macs=0.8",
        "method.trial.training.epochs=1", "method.trial.views=augmented",
        "method.tuning.training.epochs=1",
    )  # fmt: skip
    alone = command(*words).report.parent
    two = ("trainer.devices=2", "trainer.strategy=ddp", f"out={tmp_path / 'two'}")
    done = together([("-m", "vitrim", *words, *two)] * 2, env=of_torchrun(2), timeout=120)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    both = Path(done[0].stdout.splitlines()[-1]).parent
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (alone, both)]
    assert plans[0]["edits"] == plans[1]["edits"]
    trials = [(folder / DIAGNOSTICS).read_text() for folder in (alone, both)]
    assert trials[0] == trials[1]

"""Trials stopped anywhere end as those that were not, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Callback
from torch import Tensor

from nets import small_net
from phase_runner import DIGITS, At, killed, runner, stop
from vitrim.jobs import signals
from vitrim.jobs.signals import Preempted
from vitrim.method.dcvit.compression import Compression
from vitrim.method.dcvit.synthetic import SyntheticImages
from vitrim.method.dcvit.trial_training import TrialRecipe, Views
from vitrim.method.dcvit.trials import Trials
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import FeatureLoss
from vitrim.trainer.recipe import Recipe

RECIPE = Recipe(epochs=2, lr=1e-3, weight_decay=0.05, warmup_epochs=1, clip_norm=1.0)
STEPS = 5  # in an epoch
SYNTHETIC = SyntheticImages(
    images=4,
    iterations=3,
    warmup=1,
    lr=0.2,
    betas=(0.5, 0.9),
    jitter=1,
    tv_weight=1e-3,
    tv_exponent=1.0,
    l2_weight=1e-3,
    batch_size=50,
)
COMPRESSION = Compression(
    width=0.5,
    unit_selection="obs_greedy",
    order_ridge=1e-3,
    reconstruct=True,
    fold_ridge=1e-6,
    init_std=0.02,
    seed=0,
)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    with signals.handled():
        yield


Case = tuple[SyntheticImages | None, Views]


def tried(folder: Path, case: Case, *callbacks: Callback) -> dict[str, Tensor]:
    """Train trials of two blocks, two epochs each; return scores, moments and the best weights."""
    synthetic, views = case
    trials = Trials(
        small_net(dtype=torch.float32, depth=3, proj_drop_rate=0.2, **DIGITS),
        groups=[("blocks.0",), ("blocks.1",)],
        sampling=Sampling(images=8 * STEPS, tokens=4, class_token_weight=1.0),
        compression=COMPRESSION,
        recipe=TrialRecipe(training=RECIPE, views=views, loss=FeatureLoss(), freeze_tail=True),
        synthetic=synthetic,
        distance="kl",
    )
    runner(folder, minutes=0.0, batch_size=8).run_or_load(
        folder / "x", trials, name="x", callbacks=callbacks
    )
    return trials.state_dict()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(
    scope="module",
    params=[(None, "plain"), (SYNTHETIC, "plain"), (None, "augmented")],
    ids=["images", "synthetic", "augmented"],
)
def trials(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, dict[str, Tensor]]:
    ended = tried(tmp_path_factory.mktemp("trials"), request.param)
    assert ended["group_scores"].shape == (2,)
    assert ended["best_parameters"].numel() > 1000
    return request.param, ended


@pytest.mark.parametrize("step", [STEPS, 2 * STEPS + 3, 3 * STEPS])
def test_trials_stopped_anywhere_end_the_same(
    step: int, trials: tuple[Case, dict[str, Tensor]], tmp_path: Path
) -> None:
    case, ended = trials
    with pytest.raises(Preempted), signals.handled():
        tried(tmp_path, case, At(step, stop()))
    saved = [int(at.name) for at in sorted((tmp_path / "x").glob("checkpoints/*"))]
    epochs = step // STEPS
    assert saved == [STEPS * n for n in (epochs - 1, epochs) if n > 0]
    newest = torch.load(max((tmp_path / "x").glob("checkpoints/*")) / "state.ckpt")
    assert not any(name.startswith("net.") for name in newest["state_dict"])
    over = At(1, partial(pytest.fail, "started over"))
    assert same(tried(tmp_path, case, over), ended)


def test_trials_killed_again_and_again_end_the_same(
    trials: tuple[Case, dict[str, Tensor]], tmp_path: Path
) -> None:
    case, ended = trials
    for step in (7, 13, 20):
        with pytest.raises(SystemError):
            tried(tmp_path, case, At(step, killed))
    assert same(tried(tmp_path, case), ended)

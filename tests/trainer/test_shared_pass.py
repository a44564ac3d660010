"""Statistics in two processes: each takes in its share, and both find what one process does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.test_distributed import in_two_processes
from nets import images, small_net
from phase_runner import DIGITS, runner
from vitrim.closed_form.moments import MomentsError
from vitrim.jobs import distributed
from vitrim.jobs.distributed import process_group
from vitrim.method.mixed_rank.metric import Decomposition
from vitrim.method.mixed_rank.pieces import Piece
from vitrim.method.mixed_rank.profile import Profile
from vitrim.sensitivity import passes
from vitrim.sensitivity.ordered import OrderedLosses, UnitOrder
from vitrim.sensitivity.probes import measure
from vitrim.sensitivity.scorer import LossScorer
from vitrim.sensitivity.settings import LossRidges, LossSettings, Scaling
from vitrim.trainer.calibrate import Calibrate, Sampling
from vitrim.trainer.ddp import SEARCHING, strategy_for
from vitrim.trainer.shared_pass import SharedPass

BATCH = 24
"""More than the 16 images of one backward pass."""
N_IMAGES = 5 * BATCH - 7
SITES = ["blocks.0.mlp.hidden", "blocks.1.attn.heads", "blocks.1.attn.qk"]
SAMPLING = Sampling(images=N_IMAGES, tokens=3, class_token_weight=2.0)
TWO = {"devices": 2, "strategy": "ddp"}
RIDGES = LossRidges(order=1e-3, fold=1e-3, metric=1e-6, gradient_shrinkage=0.3)
SCALING = Scaling(images=BATCH + 10, shares=[0.3, 0.6])
SCRIPT = "import test_shared_pass as tests; tests.all_cases({folder!r})"
Found = dict[str, Any]


def net(**options: Any) -> nn.Module:
    return small_net(dtype=torch.float32, **{**DIGITS, **options})


def calibrate(*, with_losses: bool = False) -> Calibrate:
    dense, losses = net(), None
    if with_losses:
        losses = OrderedLosses(
            dense,
            SITES,
            order=UnitOrder("obs_greedy", 1e-3, 0),
            compensation="ridge",
            sampling=SAMPLING,
            fold_ridge=1e-3,
            choices=LossSettings(temperature=2.0, gradient_shrinkage=0.3, scaling=SCALING),
        )
    return Calibrate(dense, sites=SITES, sampling=SAMPLING, taylor=True, losses=losses)


def profile(decomposition: Decomposition, *, gradient_images: int) -> Profile:
    return Profile(
        net(),
        pieces={
            "blocks.0.attn.qkv.k": Piece("blocks.0.attn.qkv", 24, 24, 24),
            "blocks.1.mlp.fc2": Piece("blocks.1.mlp.fc2", 0, 24, 48),
        },
        decomposition=decomposition,
        sampling=SAMPLING,
        gradient_images=gradient_images,
    )


def loss_scorer(**options: Any) -> LossScorer:
    return LossScorer(
        net(**options),
        kinds=["mlp", "qk", "v", "ranks", "branches"],
        sampling=SAMPLING,
        temperature=2.0,
        ridges=RIDGES,
        scaling=SCALING,
    )


PHASES: dict[str, Callable[[], SharedPass]] = {
    "calibrate": calibrate,
    "ordered": partial(calibrate, with_losses=True),
    "asvd": partial(profile, "asvd", gradient_images=BATCH + 5),
    "normalised": partial(profile, "normalised_output", gradient_images=N_IMAGES),
    "mean": partial(profile, "mean_input", gradient_images=1),
    "losses": loss_scorer,
    "features": partial(loss_scorer, num_classes=0),
}


class Pass:
    """One phase without a Trainer, among the processes that there are, and what it calls."""

    def __init__(self, name: str) -> None:
        self.phase: Any = PHASES[name]()
        self.phase.share_out(*distributed.place())
        self.n_probes = 0

    def ended(self, x: Tensor) -> Found:
        """Return the state after a pass over images (B, C, H, W), and how often the net ran."""
        phase, ran = self.phase, []
        phase.on_train_start()
        handle = phase.net.register_forward_hook(lambda *_: ran.append(1))
        for epoch in range(phase.epochs):
            for number, batch in enumerate(x.split(BATCH)):
                if isinstance(phase, LossScorer):
                    phase.observe(batch, epoch)
                else:
                    phase.training_step((batch, None), number)
        handle.remove()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "measure", self._measure)
            phase.on_train_end()
        state = {key: value for key, value in phase.state_dict().items() if key[:4] != "net."}
        return {"state": state, "ran": len(ran), "probes": self.n_probes}

    def _measure(self, net: nn.Module, kept: Tensor, probes: Any, divergence: Any) -> list[float]:
        self.n_probes += len(probes)
        return measure(net, kept, probes, divergence)


def pictures(n: int = N_IMAGES, damaged: int | None = None) -> Tensor:
    """Return n images, of which one may have a pixel that is not finite."""
    x = images(8, dtype=torch.float32, batch=n)[:, :1].clone()
    if damaged is not None:
        x[damaged] = torch.inf
    return x


DAMAGED = (0, BATCH + 3, 2 * BATCH + 3)
"""In the first batch, which both see, in one of the second process, and of the first."""


def cases() -> Iterator[tuple[str, Tensor]]:
    """Iterate over names of phases, and images."""
    for name in PHASES:
        yield name, pictures()
        yield name, pictures(9)


def failures() -> dict[str, str]:
    """Return the errors of phases on images of which one is not finite."""
    found = {}
    for name in PHASES:
        for damaged in DAMAGED:
            with pytest.raises(MomentsError) as caught:
                Pass(name).ended(pictures(damaged=damaged))
            found[f"{name} {damaged}"] = str(caught.value)
    return found


def run(folder: Path, name: str, **options: Any) -> dict[str, Tensor]:
    """Return the state of a phase that a runner has run."""
    phase: Any = PHASES[name]()
    of_run = runner(folder / "run", batch_size=BATCH)
    of_run = replace(of_run, trainer=partial(of_run.trainer, **options))
    of_run.run_or_load(folder / name, phase, name=name)
    shared = distributed.place()[1] if options.get("strategy") in ("ddp", SEARCHING) else 1
    assert {share.processes for share in phase.shares} == {shared}
    return {key: value for key, value in phase.state_dict().items() if key[:4] != "net."}


RUNS = ("ordered", "asvd", "features")
"""Phases that a runner runs."""


def all_cases(folder: str) -> None:
    """Run everything in one of two processes, and save what it found."""
    place, rank = Path(folder), int(os.environ["RANK"])
    with process_group({"accelerator": "cpu", **TWO}):
        found = {
            "passes": [Pass(name).ended(x) for name, x in cases()],
            "failures": failures(),
            "runs": {name: run(place / "ddp", name, **TWO) for name in RUNS},
            "searching": run(place / "searching", "asvd", **{**TWO, "strategy": SEARCHING}),
            "alone": score_in_one() if rank else None,
        }
    torch.save(found, place / f"found{rank}.pt")


def score_in_one() -> dict[str, Tensor]:
    """Return what a phase finds that only one of the processes has, and nobody shared out."""
    phase: Any = PHASES["mean"]()
    phase.on_train_start()
    phase.training_step((pictures(), None), 0)
    phase.on_train_end()
    return dict(phase.state_dict())


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """Return what each of two processes found."""
    folder = tmp_path_factory.mktemp("shared")
    in_two_processes(SCRIPT.format(folder=str(folder)), timeout=120)
    return [torch.load(folder / f"found{rank}.pt") for rank in (0, 1)]


def check(first: dict[str, Tensor], second: dict[str, Tensor], alone: dict[str, Tensor]) -> None:
    """Check that two processes have the same bits, and what one has but for rounding."""
    assert first.keys() == second.keys() == alone.keys()
    assert any(value.numel() > 100 for value in alone.values())
    for key, expected in alone.items():
        assert torch.equal(first[key], second[key]), key
        least = 1e-9 * float(expected.abs().max()) if expected.numel() else 0.0
        assert torch.allclose(first[key], expected, rtol=1e-6, atol=least), key


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", PHASES)
def test_two_processes_find_what_one_does(name: str, few: bool, both: list[Found]) -> None:
    at = 2 * [*PHASES].index(name) + few
    first, second = (found["passes"][at] for found in both)
    alone = Pass(name).ended(pictures(9) if few else pictures())
    check(first["state"], second["state"], alone["state"])
    if not few:
        assert max(first["ran"], second["ran"]) < alone["ran"]
    assert first["ran"] + second["ran"] <= alone["ran"] + 4  # the first part twice, and sizes
    assert abs(first["probes"] - second["probes"]) <= 1
    assert first["probes"] + second["probes"] == alone["probes"]
    assert alone["probes"] > 0 or name not in ("ordered", "losses", "features")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_two_processes_finds_what_one_does(
    name: str, both: list[Found], tmp_path: Path
) -> None:
    first, second = (found["runs"][name] for found in both)
    check(first, second, run(tmp_path, name))


def test_ddp_that_looks_for_unused_parameters_is_shared_out(both: list[Found]) -> None:
    for found in both:
        for key, value in found["searching"].items():
            assert torch.equal(value, found["runs"]["asvd"][key]), key


def test_both_raise_what_one_process_does(both: list[Found]) -> None:
    assert both[0]["failures"] == both[1]["failures"] == failures()
    assert all("finite" in message for message in both[0]["failures"].values())


def test_a_phase_that_no_runner_has_shared_out_waits_for_nobody(both: list[Found]) -> None:
    expected = score_in_one()
    assert all(torch.equal(value, expected[key]) for key, value in both[1]["alone"].items())


def test_one_process_keeps_its_strategy() -> None:
    phase = PHASES["calibrate"]()
    assert strategy_for(phase, "ddp", epochs=1, image=pictures) == {}
    assert {share.processes for share in phase.shares} == {1}

"""Every expensive closed form computes on the device of a run, with the CPU's result."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vitrim
from calibration import ALL
from contract import subject
from nets import images, small_net
from second_device import CPU, SECOND, SecondDevice
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.closed_form import obs, reconstruction
from vitrim.method import cd, fskd
from vitrim.method.mixed_rank import metric
from vitrim.method.mixed_rank.settings import MixedRankRidges
from vitrim.network import decompose
from vitrim.network.computing import computing_on
from vitrim.prune import Slicing
from vitrim.sensitivity import losses
from vitrim.sensitivity.predict import predict, probes_of
from vitrim.sensitivity.results import results
from vitrim.sensitivity.settings import Scaling

HEAD = 8
"""Width of a head of the small network: products of single heads stay where they are."""
RIDGES = MixedRankRidges(metric=1e-6, regression=1e-3, gradient_shrinkage=0.3)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moment(size: int, seed: int = 0) -> Tensor:
    x = numbers(3 * size, size, seed=seed)
    return x.T @ x / len(x)


def singular(size: int) -> Tensor:
    x = numbers(size, 2)
    return x @ x.T


WIDE, NARROW = numbers(20, 30), numbers(30, 20)
KEPT, REMOVED = torch.arange(18), torch.arange(18, 30)
STATISTICS = {"weight": numbers(1), "mean": numbers(30), "cov": moment(30)}
GRADIENTS = {"gradient_products": moment(20), "gradient_squares": moment(20).diagonal()}
BY_LOSS = {**STATISTICS, **GRADIENTS}
SPECTRUM = decompose.decompose(WIDE, moment(30))

CASES: dict[str, list[Callable[[], Any]]] = {
    "obs_greedy": [
        partial(obs.obs_greedy, moment(200), numbers(200, 30), ridge=1e-3),
        partial(obs.obs_greedy, moment(200), numbers(200, 30), ridge=1e-3, n_removed=150),
    ],
    "regularised_inverse": [partial(obs.regularised_inverse, moment(150), 1e-3)],
    "_folded": [
        partial(
            reconstruction._folded,
            WIDE,
            STATISTICS["mean"],
            moment(30).float(),
            KEPT,
            REMOVED,
            1e-3,
        )
    ],
    "taken_over": [
        partial(
            reconstruction.taken_over,
            moment(30)[:18, :18],
            moment(30)[:18, 18:],
            WIDE[:, 18:],
            1e-3,
        )
    ],
    "ridge_fit": [
        partial(reconstruction.ridge_fit, STATISTICS, 18, 1e-3, biased=biased)
        for biased in (True, False)
    ],
    "ridge_solve": [
        partial(reconstruction.ridge_solve, moment(30), numbers(30, 20), 1e-3),
        partial(reconstruction.ridge_solve, singular(30), numbers(30, 20), 1e-18),
    ],
    "output_metric": [
        partial(decompose.output_metric, NARROW, moment(20), moment(30).diagonal(), 0.3)
    ],
    "truncated": [partial(decompose.truncated, SPECTRUM, 15)],
    "output_errors": [partial(decompose.output_errors, WIDE, moment(30))],
    "lost_output": [
        partial(decompose.lost_output, WIDE, SPECTRUM.up, SPECTRUM.down, STATISTICS["mean"])
    ],
    "decompose": [
        partial(decompose.decompose, WIDE, None),
        partial(decompose.decompose, WIDE, moment(30), outputs=moment(20)),
        partial(decompose.decompose, WIDE, moment(30), outputs=singular(20)),
        partial(decompose.decompose, NARROW, None),
        partial(decompose.decompose, NARROW, moment(20)),
        partial(decompose.decompose, NARROW, moment(20), outputs=moment(20)),
    ],
    "root_of": [partial(losses.root_of, moment(30))],
    "inverse_root_of": [partial(losses.inverse_root_of, moment(30), 1e-2)],
    "effects_of": [
        partial(losses.effects_of, WIDE, moment(20), moment(20).diagonal(), 0.3),
        partial(losses.effects_of, NARROW, moment(20), moment(30).diagonal(), 0.3),
    ],
    "unit_losses_in_order": [
        partial(losses.unit_losses_in_order, NARROW, moment(30), torch.arange(30).flip(0), 1e-3)
    ],
    "plain_unit_losses": [
        partial(losses.plain_unit_losses, NARROW, moment(30), torch.arange(30).flip(0))
    ],
    "spectrum_of": [
        partial(metric.spectrum_of, WIDE, BY_LOSS, name, RIDGES, biased=True)
        for name in ("plain", "centred", "whitening", "loss")
    ],
    "rank_curves": [partial(metric.rank_curves, WIDE, SPECTRUM, moment(30))],
    "survival_steps": [
        partial(cd.survival_steps, WIDE, moment(30), steps=9, power_iterations=3, step_margin=1.1)
    ],
    "_map": [partial(fskd._map, numbers(40, 20), numbers(40, 20, seed=1), 1e-3, diagonal=False)],
}


def test_every_marked_function_has_a_case() -> None:
    text = "\n".join(path.read_text() for path in Path(vitrim.__file__).parent.rglob("*.py"))
    assert sorted(re.findall(r"@on_device\ndef (\w+)", text)) == sorted(CASES)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for name, several in CASES.items() for case in several],
)
def test_a_marked_function_computes_on_the_device(case: Callable[[], Any]) -> None:
    expected = tree_leaves(case())
    with computing_on(CPU):
        assert all(map(same, tree_leaves(case()), expected))
    with SecondDevice() as device, computing_on(SECOND):
        found = tree_leaves(case())
    assert {each.device for each in device.products} == {SECOND}
    assert all(map(same, found, expected))


def same(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor):
        return bool(found == expected)
    return found.device == CPU and torch.equal(found, expected)


def oneshot(**changes: Any) -> Any:
    return replace(subject("oneshot").method, sampling=ALL, **changes)  # type: ignore[type-var]


def mixed_rank(**changes: Any) -> Any:
    method: Any = subject("mixed_rank").method
    return replace(method, sampling=ALL, **changes)


def joint(**changes: Any) -> Any:
    method: Any = subject("joint").method
    return replace(method, sampling=ALL, scaling=Scaling(images=0, shares=[0.5]), **changes)


METHODS: dict[str, Callable[[], Any]] = {
    "oneshot": lambda: oneshot(sites=["mlp", "heads", "qk", "v"], compensation="ridge"),
    "oneshot-obs": lambda: oneshot(criterion="obs", compensation="ridge"),
    "mixed_rank": lambda: mixed_rank(allocation="loss"),
    "mixed_rank-paper": lambda: mixed_rank(decomposition="mean_input", allocation="energy"),
    "joint": joint,
}


def scored(method: Any, net: nn.Module) -> Any:
    scorer = method.scorer(net)
    scorer.on_train_start()
    x = images(batch=16, dtype=torch.float32)
    scorer.training_step((x, None), 0) if not hasattr(scorer, "observe") else scorer.observe(x)
    scorer.on_train_end()
    return scorer


@pytest.mark.parametrize("name", METHODS)
def test_a_method_plans_and_compensates_on_the_device(name: str) -> None:
    method, net = METHODS[name](), small_net(dtype=torch.float32)
    evidence = scored(method, net).evidence()
    cost, target = Cost(net, (32, 32)), Target(metric="params", keep=0.85)
    expected = Slicing(method, cost, target)
    expected.slice(net, evidence)
    found = Slicing(method, cost, target)
    with SecondDevice() as device, computing_on(SECOND):
        found.slice(net, evidence)
    assert device.of(HEAD + 1, CPU) == []
    assert device.of(HEAD + 1, SECOND)
    assert found.plan == expected.plan
    for one, other in zip(found.compact.parameters(), expected.compact.parameters(), strict=True):
        assert one.device == CPU
        assert torch.equal(one, other)


def test_joint_predicts_on_the_device() -> None:
    net = small_net(dtype=torch.float32)
    scorer = scored(joint(edits=["mlp", "qk", "v", "ranks", "branches", "int8"]), net)
    scaling = Scaling(images=4, shares=[0.5])
    parts, statistics, ridges = scorer.parts, scorer.statistics, scorer.ridges

    def conclude() -> dict[str, Tensor]:
        found = predict(net, parts, statistics, ridges=ridges, unit=0.1)
        probes = probes_of(net, parts, statistics, found, scaling, ridges)
        measured = [(probe, 0.1) for probe in probes]
        return results(net, parts, statistics, found, measured, ridges)

    with torch.no_grad():
        expected = conclude()
        with SecondDevice() as device, computing_on(SECOND):
            found = conclude()
    assert device.of(HEAD + 1, CPU) == []
    assert device.of(HEAD + 1, SECOND)
    assert all(same(found[name], expected[name]) for name in expected)

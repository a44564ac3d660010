"""Compiled steps: one graph for each network, weights keep their names, a stop changes nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_validation import PHASES, RECIPE
from torch import nn

from nets import small_net
from phase_runner import DIGITS, At, killed, runner, stop
from vitrim.errors import ConfigError
from vitrim.jobs import signals
from vitrim.trainer.classify import Classify
from vitrim.trainer.compilation import METHODS, Compiled, check_compiles

GRAPHS = {"classify": 1, "gates": 1, "mimic": 2, "distill": 2, "recovery": 2}


def trained(phase: Any, folder: Path, *callbacks: Any, **changes: Any) -> dict[str, torch.Tensor]:
    run = runner(folder)
    trainer = partial(run.trainer, limit_train_batches=2, check_val_every_n_epoch=1)
    run = replace(run, trainer=trainer, **changes)
    run.run_or_load(folder / "x", phase, name="x", callbacks=callbacks)
    state: dict[str, torch.Tensor] = phase.state_dict()
    return state


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def is_plain(net: nn.Module) -> bool:
    return not any(name in vars(net) for name in METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPHS)
def test_each_network_is_one_graph_in_training_only(name: str, tmp_path: Path) -> None:
    graphs: list[Any] = []

    def noted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    plain, compiled = (PHASES[name]() for _ in range(2))
    expected = trained(plain, tmp_path / "plain")
    callback = Compiled(compiled.networks, backend=noted)
    found = trained(compiled, tmp_path / "compiled", callback)
    assert len(graphs) == GRAPHS[name]
    assert same(found, expected)
    assert all(is_plain(net) for net in compiled.networks)


def test_a_phase_that_fails_leaves_plain_networks(tmp_path: Path) -> None:
    phase = PHASES["classify"]()
    callback = Compiled(phase.networks, backend="eager")
    with pytest.raises(SystemError):
        trained(phase, tmp_path, callback, At(1, killed))
    assert is_plain(phase.net)


@pytest.mark.slow
def test_without_a_compiler_it_is_refused() -> None:
    without = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/g++",)})
    with without, pytest.raises(ConfigError, match=r"does not work here \(.*C\+\+ compiler.*g\+\+"):
        check_compiles("cpu")


@pytest.mark.slow
def test_a_compiled_phase_stopped_in_the_middle_ends_the_same(tmp_path: Path) -> None:
    check_compiles("cpu")
    recipe = replace(RECIPE, epochs=2)

    def phase() -> Classify:
        torch.manual_seed(0)
        net = small_net(dtype=torch.float32, drop_rate=0.2, **DIGITS)
        return Classify(net, recipe=recipe, n_classes=10)

    whole = trained(phase(), tmp_path / "whole", compiles=True)
    with signals.handled(), pytest.raises(signals.Preempted):
        trained(phase(), tmp_path / "stopped", At(3, stop()), compiles=True)
    assert same(trained(phase(), tmp_path / "stopped", compiles=True), whole)
    plain = trained(phase(), tmp_path / "plain")
    assert plain.keys() == whole.keys()

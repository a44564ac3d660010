"""PRACTISE and MiR: which blocks go, adaptors, budgets, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import fit, randomise, small_net
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError, resolve_target
from vitrim.cli.compose import CONF
from vitrim.errors import VitrimError
from vitrim.method.practise.method import Practise
from vitrim.method.practise.recoverability import Recoverability
from vitrim.network.structure import blocks_of
from vitrim.plan import Drop, Evidence, Plan
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.classify import Classify
from vitrim.trainer.mimic import Mimic

SAMPLING = Sampling(images=32, tokens=None, class_token_weight=1.0)


def composed(*overrides: str, kind: str = "practise") -> tuple[Practise, Target]:
    """Return the method and the target of a command."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"method={kind}", *overrides])
    method: Practise = instantiate(cfg.method, _convert_="all")
    target = resolve_target(
        cfg.strength, cfg.target, levels=method.levels, metric=method.metric, where=f"{kind}.yaml"
    )
    return method, target


def deep() -> nn.Module:
    return small_net(dtype=torch.float32, depth=4)


def errors_of(net: nn.Module, blocks: list[str], *, adaptors: bool) -> Tensor:
    phase = Recoverability(net, blocks=blocks, sampling=SAMPLING, adaptors=adaptors, ridge=1e-6)
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = DataLoader(TensorDataset(x, torch.zeros(32)), batch_size=8)
    fit(phase, batches, epochs=phase.epochs)
    assert [*phase.evidence().block_scores] == blocks
    return torch.tensor([*phase.evidence().block_scores.values()], dtype=torch.float64)


def silence(net: nn.Module, block: str) -> None:
    """Let a block add nothing."""
    with torch.no_grad():
        for end in ("attn.proj", "mlp.fc2"):
            for tensor in net.get_submodule(f"{block}.{end}").parameters():
                tensor.zero_()


def test_a_block_that_does_nothing_is_free_to_drop() -> None:
    net, names = deep(), [f"blocks.{i}" for i in range(4)]
    silence(net, "blocks.2")
    errors = errors_of(net, names, adaptors=False)
    assert errors.argmin() == 2
    assert errors[2] == 0
    assert bool((errors[[0, 1, 3]] > 0.01).all())


def test_an_adaptor_stands_in_for_what_is_linear() -> None:
    net, names = deep(), [f"blocks.{i}" for i in range(4)]
    without, with_adaptor = (errors_of(net, names, adaptors=on) for on in (False, True))
    assert bool((with_adaptor < without).all())
    before = [tensor.clone() for tensor in net.parameters()]
    errors_of(net, names, adaptors=True)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_convolutional_blocks_are_judged_by_channels() -> None:
    torch.manual_seed(0)
    net = randomise(timm.create_model("resnet18").float()).eval()
    names = [*blocks_of(Cost(net, 32).structure)]
    without, with_adaptor = (errors_of(net, names, adaptors=on) for on in (False, True))
    assert without.shape == with_adaptor.shape == (len(names),)
    assert bool((with_adaptor < without).all())


@pytest.mark.parametrize(("n", "dropped"), [(1, ["blocks.3"]), (2, ["blocks.1", "blocks.3"])])
def test_the_easiest_blocks_go_until_the_budget_is_met(n: int, dropped: list[str]) -> None:
    net, (method, target) = deep(), composed(f"target.blocks={n}")
    cost = Cost(net, 32)
    errors = dict(zip([f"blocks.{i}" for i in range(4)], [4.0, 2.0, 3.0, 1.0], strict=True))
    proposal = method.plan(net, Evidence(block_scores=errors), cost, target)
    assert sorted(proposal.notes["blocks"]) == dropped
    scores = proposal.diagnostics["scores"]
    assert [*scores] == [*errors]
    assert scores["blocks.0"] / scores["blocks.3"] == pytest.approx(4)  # blocks of one share
    assert set(proposal.edits) == {
        Drop(branch=f"{block}.{part}") for block in dropped for part in ("attn", "mlp")
    }
    assert cost.plan(Plan(model={}, edits=proposal.edits)).macs == cost.limit(target)


def test_mir_is_the_same_without_adaptors() -> None:
    assert composed(kind="mir")[0].adaptors is False
    assert composed(kind="practise")[0].adaptors is True


@pytest.mark.parametrize(("objective", "phase"), [("mimic", "Mimic"), ("labels", "Classify")])
def test_plain_fine_tuning_takes_the_place_of_mimicking(objective: str, phase: str) -> None:
    method, _ = composed(f"method.objective={objective}")
    (tuning,) = method.recovery(deep(), deep(), Evidence(), 10)
    assert isinstance(tuning, Mimic | Classify)
    assert type(tuning).__name__ == phase
    assert tuning.recipe == method.tuning


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.protected=[1]"], r"method\.protected=\[1\]"),
        (["method.adaptors=maybe"], r"method\.adaptors=maybe"),
        (["method.ridge=0"], r"method\.ridge=0"),
        (["method.pooled_weight=-1"], r"method\.pooled_weight=-1"),
        (["method.objective=bp"], r"method\.objective=bp: expected mimic, labels"),
    ],
)
def test_bad_settings_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as raised:
        composed(*overrides)
    cause: Any = raised.value.__cause__ or raised.value
    assert isinstance(cause, VitrimError)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["target.macs=0.4", "method.protected=[1,1]"],
            r"target\.macs=0\.4 cannot be reached: dropping all 2 candidate blocks.*"
            r"protect fewer blocks \(method\.protected\)",
        ),
        (["target.units=10"], r"target\.units: whole blocks are dropped"),
    ],
)
def test_an_unreachable_target_is_refused_before_any_training(
    overrides: list[str], message: str
) -> None:
    method, target = composed(*overrides)
    with pytest.raises(TargetError, match=message):
        method.check(Cost(deep(), 32), target)


def test_without_images_blocks_go_in_network_order() -> None:
    net, (method, target) = deep(), composed("target.blocks=2")
    proposal = method.plan(net, Evidence(), Cost(net, 32), target)
    assert proposal.notes["blocks"] == ["blocks.0", "blocks.1"]
    assert proposal.diagnostics == {}

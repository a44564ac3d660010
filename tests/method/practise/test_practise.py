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
from vitrim.budget.target import TargetError
from vitrim.cli.compose import CONF
from vitrim.errors import VitrimError
from vitrim.method.practise.method import Practise
from vitrim.method.practise.recover import Recover
from vitrim.network.structure import blocks_of
from vitrim.plan import BLOCKS, Drop, Evidence
from vitrim.trainer.calibrate import Sampling

SAMPLING = Sampling(images=32, tokens=None, readout=1.0)


def built(*overrides: str, kind: str = "practise") -> Practise:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"method={kind}", *overrides])
    method: Practise = instantiate(cfg.method, _convert_="all")
    return method


def deep() -> nn.Module:
    return small_net(dtype=torch.float32, depth=4)


def judged(net: nn.Module, blocks: list[str], *, adaptors: bool) -> Tensor:
    phase = Recover(net, blocks=blocks, sampling=SAMPLING, adaptors=adaptors, ridge=1e-6)
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = DataLoader(TensorDataset(x, torch.zeros(32)), batch_size=8)
    fit(phase, batches, epochs=phase.epochs)
    return phase.evidence().scores[BLOCKS]


def silence(net: nn.Module, block: str) -> None:
    """Let a block add nothing."""
    with torch.no_grad():
        for end in ("attn.proj", "mlp.fc2"):
            for tensor in net.get_submodule(f"{block}.{end}").parameters():
                tensor.zero_()


def test_a_block_that_does_nothing_is_free_to_drop() -> None:
    net, names = deep(), [f"blocks.{i}" for i in range(4)]
    silence(net, "blocks.2")
    found = judged(net, names, adaptors=False)
    assert found.argmin() == 2
    assert found[2] == 0
    assert bool((found[[0, 1, 3]] > 0.01).all())


def test_an_adaptor_stands_in_for_what_is_linear() -> None:
    net, names = deep(), [f"blocks.{i}" for i in range(4)]
    without, with_adaptor = (judged(net, names, adaptors=on) for on in (False, True))
    assert bool((with_adaptor < without).all())
    before = [tensor.clone() for tensor in net.parameters()]
    judged(net, names, adaptors=True)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_convolutional_blocks_are_judged_by_channels() -> None:
    torch.manual_seed(0)
    net = randomise(timm.create_model("resnet18").float()).eval()
    names = [*blocks_of(Cost(net, 32).structure)]
    without, with_adaptor = (judged(net, names, adaptors=on) for on in (False, True))
    assert without.shape == with_adaptor.shape == (len(names),)
    assert bool((with_adaptor < without).all())


@pytest.mark.parametrize(("n", "dropped"), [(1, ["blocks.3"]), (2, ["blocks.1", "blocks.3"])])
def test_the_easiest_blocks_go_until_the_budget_is_met(n: int, dropped: list[str]) -> None:
    net, method = deep(), built(f"target.blocks={n}")
    cost = Cost(net, 32)
    evidence = Evidence(scores={BLOCKS: torch.tensor([4.0, 2.0, 3.0, 1.0])})
    plan = method.plan(net, evidence, cost)
    assert sorted(plan.provenance["blocks"]) == dropped
    assert set(plan.edits) == {
        Drop(branch=f"{block}.{part}") for block in dropped for part in ("attn", "mlp")
    }
    assert cost.plan(plan).macs == cost.allowed(method.budget)


def test_mir_is_the_same_without_adaptors() -> None:
    assert built(kind="mir").adaptors is False
    assert built(kind="practise").adaptors is True


@pytest.mark.parametrize(("objective", "phase"), [("mimic", "Mimic"), ("labels", "Classify")])
def test_plain_fine_tuning_takes_the_place_of_mimicking(objective: str, phase: str) -> None:
    method = built(f"method.objective={objective}")
    (found,) = method.recovery(deep(), deep(), Evidence(scores={}), 10)
    assert type(found).__name__ == phase
    assert found.recipe == method.tuning


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.spare=[1]"], r"method\.spare=\[1\]"),
        (["method.adaptors=maybe"], r"method\.adaptors=maybe"),
        (["method.ridge=0"], r"method\.ridge=0"),
        (["method.pooled=-1"], r"method\.pooled=-1"),
        (["method.objective=bp"], r"method\.objective=bp: expected mimic, labels"),
        (["target.units=10"], r"target\.units: whole blocks are dropped"),
    ],
)
def test_bad_settings_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(Exception, match=said) as raised:
        built(*overrides)
    cause: Any = raised.value.__cause__ or raised.value
    assert isinstance(cause, VitrimError)


def test_an_unreachable_target_is_refused_before_any_training() -> None:
    said = r"target\.macs=0\.4 cannot be reached: dropping all 2 candidate blocks"
    with pytest.raises(TargetError, match=said):
        built("target.macs=0.4", "method.spare=[1,1]").check(Cost(deep(), 32))

"""PRACTISE and MiR: which blocks go, adaptors, budgets, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nets import fit, randomise, skeleton_net, small_net
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError, resolve_target
from vitrim.cli.compose import CONF
from vitrim.errors import VitrimError
from vitrim.method.practise.candidates import candidates_of
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


def errors_of(net: nn.Module, blocks: list[str], *, adaptors: bool, size: int = 1) -> Tensor:
    groups = [tuple(blocks[i : i + size]) for i in range(0, len(blocks), size)]
    phase = Recoverability(
        net, groups=groups, sampling=SAMPLING, adaptors=adaptors, ridge=1e-6, latency_repeats=0
    )
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    batches = DataLoader(TensorDataset(x, torch.zeros(32)), batch_size=8)
    fit(phase, batches, epochs=phase.epochs)
    assert [*phase.evidence().block_scores] == blocks[::size]
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


def test_convolutional_blocks_are_best_by_channels() -> None:
    torch.manual_seed(0)
    net = randomise(timm.create_model("resnet18").float()).eval()
    names = [*blocks_of(Cost(net, 32).structure)]
    without, with_adaptor = (errors_of(net, names, adaptors=on) for on in (False, True))
    assert without.shape == with_adaptor.shape == (len(names),)
    assert bool((with_adaptor < without).all())


def test_a_pair_is_replaced_as_one() -> None:
    net, names = deep(), [f"blocks.{i}" for i in range(4)]
    silence(net, "blocks.2")
    silence(net, "blocks.3")
    without = errors_of(net, names, adaptors=False, size=2)
    assert without[1] == 0 < without[0]
    assert bool((errors_of(net, names, adaptors=True, size=2)[0] < without[0]).all())


@pytest.mark.parametrize(("n", "dropped"), [(1, ["blocks.3"]), (2, ["blocks.1", "blocks.3"])])
def test_the_easiest_blocks_go_until_the_budget_is_met(n: int, dropped: list[str]) -> None:
    net, (method, target) = deep(), composed(f"target.blocks={n}", "method.protected=[0,0]")
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
    assert composed(kind="mir")[0].recoverability == "no_adaptors"
    assert composed(kind="practise")[0].recoverability == "end_to_end"


def test_the_default_is_the_papers() -> None:
    training = composed()[0].adaptor_training
    rates = [training.lr_at(i) for i in (0, 399, 400, 799, 800, 999)]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    assert (training.iterations, training.momentum, training.weight_decay) == (1000, 0.9, 1e-4)


TABLE4 = (
    *("method.pooled_weight=0", "method.tuning.epochs=2000"),
    *("method.tuning.lr=3e-5", "method.tuning.warmup_epochs=20"),
)


@pytest.mark.parametrize(
    ("of_dcvit", "of_practise"),
    [
        (("method=dcvit",), ("method=practise",)),
        (("experiment=dcvit/vit_tiny",), ("experiment=dcvit/vit_tiny", "method=practise")),
        (("experiment=dcvit/vit_tiny",), ("experiment=dcvit/vit_tiny_practise",)),
        (("experiment=dcvit/table3",), ("experiment=dcvit/table3_practise",)),
        (("experiment=dcvit/table5",), ("experiment=dcvit/table5_practise",)),
        (("experiment=dcvit/table4_dcvit",), ("experiment=dcvit/table4", *TABLE4)),
        (("experiment=dcvit/table4_dcvit",), ("experiment=dcvit/table4", "method=mir", *TABLE4)),
    ],
    ids=lambda overrides: "-".join(overrides[:2]),
)
def test_both_rivals_recover_alike(of_dcvit: tuple[str, ...], of_practise: tuple[str, ...]) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        dcvit, practise = (
            compose("run", overrides=[*overrides]) for overrides in (of_dcvit, of_practise)
        )
    assert dcvit.data == practise.data
    assert dcvit.method.tuning.pooled_weight == practise.method.pooled_weight
    epochs = {"epochs": practise.method.tuning.epochs}  # of all of DC-ViT's steps together
    assert {**dcvit.method.tuning.training, **epochs} == practise.method.tuning


def test_all_methods_of_a_table_see_the_same_images() -> None:
    text = (CONF / "experiment" / "dcvit" / "table4.yaml").read_text()
    (samples,) = re.findall(r"^  samples: (\d+)$", text, re.MULTILINE)
    commands = re.findall(
        r"^#   vitrim .*method=(?:fskd|cd) method.images=(\d+)", text, re.MULTILINE
    )
    assert commands == [samples, samples]


def candidates(name: str, **settings: Any) -> list[tuple[str, ...]]:
    described = Cost(skeleton_net(name), 224).structure
    return candidates_of(described, **{"protected": None, "group_size": 1, **settings})


def test_the_papers_blocks_are_spared() -> None:
    assert candidates("vit_tiny_patch16_224") == [(f"blocks.{i}",) for i in range(1, 11)]
    blocks = [group[0] for group in candidates("resnet34")]
    assert blocks == [
        f"layer{stage}.{block}"
        for stage, depth in ((1, 3), (2, 4), (3, 6), (4, 3))
        for block in range(1, depth)
    ]
    blocks = [group[0] for group in candidates("mobilenetv2_100")]
    assert blocks == [
        f"blocks.{stage}.{block}"
        for stage, depth in ((1, 2), (2, 3), (3, 4), (4, 3), (5, 3))
        for block in range(1, depth)
    ]
    assert candidates("resnet34", protected=[0, 0])[0] == ("layer1.0",)


def test_swin_loses_pairs() -> None:
    groups = candidates("swin_tiny_patch4_window7_224", group_size=2)
    pairs = [("1", 0), ("2", 0), ("2", 2), ("2", 4)]
    assert groups == [
        tuple(f"layers.{stage}.blocks.{n}" for n in (first, first + 1)) for stage, first in pairs
    ]


def test_a_block_that_saves_more_time_goes_first() -> None:
    net = deep()
    method, target = composed("target.blocks=1", "method.saving=latency")
    errors = {"blocks.1": 1.0, "blocks.2": 1.5}
    for savings, dropped in (({}, "blocks.1"), ({"blocks.1": 0.1, "blocks.2": 0.2}, "blocks.2")):
        evidence = Evidence(block_scores=errors, block_savings=savings)
        proposal = method.plan(net, evidence, Cost(net, 32), target)
        assert proposal.notes["blocks"] == [dropped]


def test_pairs_are_dropped_whole() -> None:
    net = deep()
    method, target = composed("target.blocks=1", "method.protected=[0,0]", "method.group_size=2")
    proposal = method.plan(
        net, Evidence(block_scores={"blocks.0": 2.0, "blocks.2": 1.0}), Cost(net, 32), target
    )
    assert proposal.notes["blocks"] == ["blocks.2", "blocks.3"]
    assert len(proposal.edits) == 4


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
        (["method.recoverability=maybe"], r"method\.recoverability=maybe: expected end_to_end, "),
        (["method.saving=params"], r"method\.saving=params: expected macs, latency"),
        (["method.group_size=0"], r"method\.group_size=0"),
        (["method.adaptor_training.iterations=0"], r"method\.adaptor_training\.iterations=0"),
        (["method.adaptor_training.momentum=1"], r"method\.adaptor_training\.momentum=1"),
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
    assert proposal.notes["blocks"] == ["blocks.1", "blocks.2"]
    assert proposal.diagnostics == {}


def test_blocks_of_a_convolutional_network_are_no_pairs() -> None:
    with pytest.raises(VitrimError, match=r"method\.group_size=2: this network has no attentions"):
        candidates("resnet34", group_size=2)

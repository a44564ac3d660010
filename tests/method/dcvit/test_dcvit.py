from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from typing import Any

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torch import nn

from command import QUICK, Command, Done, swin
from nets import randomise, skeleton_net, small_net
from vitrim import count
from vitrim.budget.blocks import (
    Group,
    dense_widths,
    fewest_groups,
    flatten,
    groups_of,
    share_of,
)
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, resolve_target
from vitrim.cli.compose import CONF
from vitrim.errors import ConfigError, VitrimError
from vitrim.method.dcvit.accounting import paper_macs, paper_widths
from vitrim.method.dcvit.compression import edits_of, shape_of_trial
from vitrim.method.dcvit.method import DCViT
from vitrim.method.dcvit.trial_training import trained_tensors
from vitrim.network.structure import blocks_of
from vitrim.network.surgery import cut
from vitrim.plan import Drop, Evidence, Keep, Plan, Proposal
from vitrim.trainer.mimic import Mimic
from vitrim.trainer.phase import AllButHeldOut
from vitrim.trainer.recovery import Recovery


def composed(*overrides: str) -> tuple[DCViT, Target]:
    """Return the method and the target of a command."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=["method=dcvit", *overrides])
    method: DCViT = instantiate(cfg.method, _convert_="all")
    target = resolve_target(
        cfg.strength, cfg.target, levels=method.levels, metric=method.metric, where="dcvit.yaml"
    )
    return method, target


def check(cost: Cost, *overrides: str) -> None:
    """Check a command's target as a run does, before any training."""
    method, target = composed(*overrides)
    method.check(cost, target)


def plan_from(proposal: Proposal) -> Plan:
    return Plan(model={}, edits=proposal.edits)


@cache
def cost_of(name: str) -> Cost:
    return Cost(skeleton_net(name), 224)


def singles(cost: Cost) -> list[Group]:
    return [(block,) for block in [*blocks_of(cost.structure)][1:-1]]


def narrowed(
    cost: Cost, target: Target, order: list[Group], *, extra: int = 0
) -> tuple[dict[str, int], list[str]]:
    """Return the widths of the fewest groups that meet the target, and of `extra` more."""
    return dense_widths(cost, target, order[: fewest_groups(cost, target, order, hint="") + extra])


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("vit_tiny_patch16_224", (575, 383, 286, 229)),
        ("vit_small_patch16_224", (1152, 767, 574, 459)),
        ("vit_base_patch16_224", (2304, 1535, 1151, 920)),
        ("deit_base_patch16_224", (2304, 1535, 1151, 920)),
        ("vit_large_patch16_224", (3072, 2047, 1535, 1227)),
    ],
)
def test_the_papers_widths_come_out_with_its_accounting(name: str, widths: tuple[int, ...]) -> None:
    cost = cost_of(name)
    for n, width in enumerate(widths, start=1):
        by_block = paper_widths(cost, Target(metric="blocks", keep=n), singles(cost))
        assert list(by_block.values()) == [width] * (n + 1)


@pytest.mark.parametrize(("n", "width"), [(2, 2303), (3, 1842), (4, 1535)])
def test_one_block_more_leaves_as_many_macs_of_the_papers_count(n: int, width: int) -> None:
    cost = cost_of("deit_base_patch16_224")
    _, block, blocks = paper_macs(cost)
    target = Target(metric="blocks", keep=n)
    widths = paper_widths(cost, target, singles(cost), extra_blocks=1)
    assert list(widths.values()) == [width] * (n + 2)
    attention, mlp = blocks["blocks.1"]
    removed = (n + 2) * (attention + mlp * (3072 - width) / 3072)
    assert 0 <= removed - n * block <= (n + 2) * mlp / 3072


def test_the_papers_count_of_vit_base() -> None:
    cost = cost_of("vit_base_patch16_224")
    total, block, blocks = paper_macs(cost)
    attention, mlp = blocks["blocks.1"]
    assert (total, block) == (16_863_630_336, 1_395_554_304)
    assert (attention, mlp) == (465_386_496, 929_562_624)
    assert (total - 3 * block) / total == pytest.approx(0.751734186, abs=1e-9)


SWIN = "swin_base_patch4_window7_224"


def test_the_papers_count_of_swins_stages() -> None:
    _, block, blocks = paper_macs(cost_of(SWIN))
    total = 0
    for stage, depth in enumerate((2, 2, 18, 2)):
        tokens, dim = 56**2 >> 2 * stage, 128 << stage
        parts = {blocks[f"layers.{stage}.blocks.{i}"] for i in range(depth)}
        assert parts == {(4 * tokens * dim * (dim + 1), 8 * tokens * dim**2)}
        total += depth * 4 * tokens * dim * (3 * dim + 2)
    assert block == total // 24


@pytest.mark.parametrize("keep", [0.5, 1.5, 2.5, 4, 7])
def test_blocks_of_several_stages_meet_the_papers_budget_with_one_share(keep: float) -> None:
    cost = cost_of(SWIN)
    _, block, blocks = paper_macs(cost)
    order = [f"layers.{stage}.blocks.{at}" for at in (0, 1) for stage in (0, 3, 2, 1)]
    groups = [(block,) for block in order]
    widths = paper_widths(cost, Target(metric="blocks", keep=keep), groups)
    assert [*widths] == order[: len(widths)]
    sizes = {name: 512 << int(name.split(".")[1]) for name in widths}
    removed = sum(
        blocks[name][0] + blocks[name][1] * (size - widths[name]) / size
        for name, size in sizes.items()
    )
    unit = sum(blocks[name][1] / size for name, size in sizes.items())
    assert -1 <= removed - keep * block < unit
    shares = [widths[name] / size for name, size in sizes.items()]
    assert max(shares) - min(shares) < 1 / 512


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_fifty_targets_are_met_to_within_a_hidden_unit_a_block(metric: Any) -> None:
    cost = cost_of("deit_tiny_patch16_224")
    unit = 2 * 192 * 197 if metric == "macs" else 2 * 192 + 1
    for step in range(50):
        target = Target(metric=metric, keep=0.995 - 0.0115 * step)
        widths, dropped = narrowed(cost, target, singles(cost))
        plan = plan_of(cost, widths, dropped)
        remaining = cost.plan(plan).of(metric)
        assert 0 <= cost.limit(target) - remaining < unit, (target, widths)
        assert max(widths.values()) - min(widths.values()) <= 1


def plan_of(cost: Cost, widths: dict[str, int], dropped: list[str]) -> Any:
    edits: list[Any] = [Drop(branch=f"{block}.attn") for block in dropped]
    edits += [
        Keep(site=f"{block}.mlp.hidden", index=tuple(range(width)))
        for block, width in widths.items()
        if width < cost.structure.sites[f"{block}.mlp.hidden"].size
    ]
    return Plan(model={}, edits=tuple(edits))


def test_so_little_may_go_that_an_attention_stays() -> None:
    cost = cost_of("deit_tiny_patch16_224")
    widths, dropped = narrowed(cost, Target(metric="blocks", keep=0.1), singles(cost))
    assert dropped == []
    assert list(widths) == ["blocks.1"]


def test_more_blocks_take_less_of_each() -> None:
    cost = cost_of("deit_tiny_patch16_224")
    target = Target(metric="blocks", keep=2)
    few, _ = narrowed(cost, target, singles(cost))
    more, dropped = narrowed(cost, target, singles(cost), extra=1)
    assert len(more) == len(few) + 1 == len(dropped)
    assert min(more.values()) > max(few.values())


def deep_net() -> nn.Module:
    return small_net(dtype=torch.float32, depth=6)


@pytest.mark.parametrize("strength", [0.3, 1, 2.5, 4])
def test_the_plan_without_images_is_within_the_target(strength: float) -> None:
    net, (method, target) = deep_net(), composed(f"strength={strength}")
    cost = Cost(net, 32)
    plan = plan_from(method.plan(net, Evidence(), cost, target))
    limit = cost.limit(target)
    assert 0 <= limit - cost.plan(plan).macs < 2 * 24 * 5
    assert count(cut(net, plan), 32)[:2] == cost.plan(plan)[:2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.unit_selection=magic"], "method.unit_selection=magic"),
        (["method.accounting=mine"], "method.accounting=mine"),
        (
            ["method.group_size=0"],
            "method.group_size=0: expected a whole number of blocks from 1 on",
        ),
        (["method.group_size=1.5"], "method.group_size=1.5"),
        (["method.group_size=two"], "method.group_size=two"),
        (["method.protected=[1]"], r"method\.protected=\[1\]"),
        (["method.extra_blocks=-1"], "method.extra_blocks=-1"),
        (
            ["method.extra_blocks=1", "method.drop_mlps=true", "method.reconstruct=false"],
            "method.extra_blocks=1: .* 0 with drop_mlps",
        ),
        (["method.drop_mlps=true"], "method.reconstruct=true: .* false with unit_selection=none"),
        (["method.unit_selection=none"], "method.reconstruct=true: .* false with unit_selection"),
        (["method.drop_mlps=1"], "method.drop_mlps=1: expected true or false"),
        (["method.trial.views=shuffled"], r"method\.trial\.views=shuffled: expected plain or"),
        (["method.init_std=-1"], r"method\.init_std=-1"),
        (["method.allowed_blocks=[]"], r"method\.allowed_blocks=\[\]"),
        (["method.trial.width=0"], r"method\.trial\.width=0"),
        (["method.trial.width=2"], r"method\.trial\.width=2"),
        (["method.synthetic.images=0"], r"method\.synthetic\.images=0"),
        (["method.synthetic.lr=0"], r"method\.synthetic\.lr=0"),
        (["method.synthetic.batch_size=0"], r"method\.synthetic\.batch_size=0"),
        (["method.synthetic.betas=[0.5,1]"], r"method\.synthetic\.betas=\[0\.5,1\]"),
        (["method.judging_set=real"], "method.judging_set=real"),
        (["method.distance=cosine"], "method.distance=cosine"),
        (["method.tuning.mimic=patches"], r"method\.tuning\.mimic=patches"),
        (["method.ridges.fold=0"], r"method\.ridges\.fold=0"),
    ],
)
def test_bad_settings_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as raised:
        composed(*overrides)
    cause = raised.value.__cause__ or raised.value
    assert isinstance(cause, (VitrimError, ConfigError))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["target.units=100"], "target.units: attentions are removed"),
        (["method.accounting=paper", "target.params=0.8"], "target.params: method.accounting"),
        (["target.macs=0.2"], "target.macs=0.2 cannot be reached: compressing all 4 candidate"),
        (
            ["target.blocks=1", "method.extra_blocks=3"],
            "method.extra_blocks=3: 2 blocks and these are more than",
        ),
        (
            ["method.allowed_blocks=[blocks.0]"],
            "method.allowed_blocks: blocks.0: expected some of blocks.1, blocks.2",
        ),
        (["method.group_size=2", "target.macs=0.7"], "all 1 candidates (2 blocks) leaves"),
        (
            ["method.group_size=2", "target.blocks=1", "method.extra_blocks=1"],
            "method.extra_blocks=1: 2 blocks and these are more than the 1 candidates (2 blocks)",
        ),
        (
            ["method.group_size=2", "target.blocks=2", "method.accounting=paper"],
            "it takes 4 blocks, and there are 1 candidates (2 blocks)",
        ),
        (
            ["method.group_size=2", "method.allowed_blocks=[blocks.1]"],
            "expected some of blocks.2, blocks.3",
        ),
        (["method.group_size=5"], "method.group_size=5, method.protected=[1, 1]: no stage has 5"),
        (
            ["target.blocks=3", "method.accounting=paper", "method.extra_blocks=1"],
            "method.extra_blocks=1: 4 blocks and these are more than the 4 candidates",
        ),
        (
            ["target.blocks=5", "method.drop_mlps=true", "method.reconstruct=false"],
            "all 4 candidates (4 blocks) removed are not enough",
        ),
        (["target.blocks=9"], "target.blocks=9: the network has 6 blocks"),
        (
            ["target.blocks=4.5", "method.accounting=paper"],
            "target.blocks=4.5 cannot be reached: it takes 5 blocks, and there are 4 candidates",
        ),
    ],
)
def test_unreachable_targets_are_refused_before_any_training(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(VitrimError, match=re.escape(message)):
        check(Cost(deep_net(), 32), *overrides)


def provenance(done: Done) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((done.report.parent / "plan.json").read_text())
    notes: dict[str, Any] = plan["provenance"]
    return notes


def trials(done: Done) -> dict[str, float]:
    """Return the scores of the trials that a run wrote to its diagnostics."""
    text = (done.report.parent / "diagnostics.json").read_text()
    scores: dict[str, float] = json.loads(text)["trials"]
    return scores


SHORT = (
    *QUICK,
    "method.judging_set=synthetic",
    "method.synthetic.iterations=2",
    "method.synthetic.images=4",
    "method.tuning.training.epochs=1",
)


@pytest.mark.slow
def test_few_params_may_remain(command: Command) -> None:
    done = command("method=dcvit", *SHORT, "method.judging_set=images", "target.params=0.7")
    assert done.code == 0, done.output


def test_synthetic_images_are_drawn(command: Command) -> None:
    done = command("method=dcvit", "strength=4", *SHORT)
    with Image.open(done.report.parent / "synthetic.png") as image:
        assert image.size == (4 * 10 + 2, 12)  # four of 8 pixels, 2 pixels between them


@pytest.mark.slow
def test_progress_is_judged_after_every_block(command: Command) -> None:
    done = command("method=dcvit", "target.macs=0.6", *SHORT)
    report = json.loads(done.report.read_text())
    assert set(report["stages"]) == {"cut", "refit", "mimic", "refit-2", "mimic-2"}


@pytest.mark.parametrize(
    ("width", "stages"),
    [
        (
            0.3125,
            {"cut", "mimic", "refit", "mimic-2"},
        ),  # the 80 of 256 units that the budget leaves
        (0.5, {"cut", "refit", "mimic", "refit-2", "mimic-2"}),
    ],
)
def test_the_best_trial_is_the_first_step_if_it_fits(
    command: Command, width: float, stages: set[str]
) -> None:
    trained = ("method.trial.training.epochs=1", f"method.trial.width={width}")
    done = command("method=dcvit", "target.macs=0.6", *SHORT, *trained)
    assert provenance(done)["widths"] == [80, 79]
    assert set(json.loads(done.report.read_text())["stages"]) == stages


def test_the_trial_is_judged_where_that_is_all(command: Command) -> None:
    trained = ("method.trial.training.epochs=3", f"method.trial.width={79 / 256}")
    done = command("method=dcvit", "target.macs=0.8", *SHORT, *trained)
    assert provenance(done)["widths"] == [79]
    report = json.loads(done.report.read_text())
    assert set(report["stages"]) == {"cut", "mimic"}
    assert report["compact"]["top1"] == report["stages"]["mimic"]["top1"]


def test_blocks_can_be_chosen_by_hand_and_share_the_trials(command: Command) -> None:
    for block in ("blocks.1", "blocks.2"):
        done = command(
            "method=dcvit", "target.blocks=0.9", *SHORT, f"method.allowed_blocks=[{block}]"
        )
        assert provenance(done)["blocks"] == [block]
        assert set(trials(done)) == {"blocks.1", "blocks.2"}
    assert len([*(command.out / "phases").glob("score-*")]) == 1


def test_compression_leaves_the_dense_network_alone() -> None:
    net = randomise(deep_net())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    method, target = composed("strength=4")
    cut(net, plan_from(method.plan(net, Evidence(), Cost(net, 32), target)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_network_without_anything_to_drop_is_refused_in_words() -> None:
    cost = Cost(skeleton_net("mixer_s32_224"), 224)
    with pytest.raises(ConfigError, match="no blocks of an attention and an MLP"):
        check(cost, "strength=2")


def test_of_a_convolutional_network_the_fewest_blocks_go_by_score_for_their_share() -> None:
    net = skeleton_net("mobilenetv2_100")
    cost = Cost(net, 64)
    method, target = composed("target.macs=0.9", "method.protected=[0,0]")
    blocks = [*blocks_of(cost.structure)]
    shares = torch.tensor([share_of(cost, block) for block in blocks])
    scores = shares * torch.arange(len(blocks), 0, -1)  # for their share, the last is the easiest
    by_block = dict(zip(blocks, scores.tolist(), strict=True))
    plan = plan_from(method.plan(net, Evidence(block_scores=by_block), cost, target))
    dropped = [edit.branch for edit in plan.drops()]
    assert dropped == blocks[: -len(dropped) - 1 : -1]
    assert len(dropped) == len(plan.edits)
    limit = cost.limit(target)
    assert cost.plan(plan).macs <= limit
    fewer = Plan(model={}, edits=plan.edits[:-1])
    assert cost.plan(fewer).macs > limit
    unseen = method.plan(net, Evidence(), cost, target)
    assert unseen.notes["blocks"] == blocks[: len(unseen.edits)]
    assert unseen.diagnostics == {}


def test_a_trial_that_cannot_be_the_first_step_leaves_no_trace() -> None:
    net = randomise(deep_net())
    method, target = composed(
        "target.macs=0.8", "method.trial.width=0.9", "method.reconstruct=false"
    )
    cost = Cost(net, 32)
    scores = {f"blocks.{i}.mlp.hidden": torch.arange(48.0) for i in range(1, 5)}
    block_scores = {f"blocks.{i}": float(i) for i in range(1, 5)}
    shape = shape_of_trial(cost.structure, ("blocks.1",), 0.9)
    first = Plan(model={}, edits=edits_of(cost.structure, shape, scores))
    trained = torch.cat([7 * tensor.flatten() for tensor in trained_tensors(cut(net, first))])
    evidence = Evidence(scores=scores, block_scores=block_scores, best_trial=("blocks.1", trained))
    proposal = method.plan(net, evidence, cost, target)
    assert proposal.notes["blocks"] == ["blocks.1", "blocks.2"]
    assert proposal.diagnostics == {"trials": block_scores}
    student = cut(net, plan_from(proposal))
    next(iter(method.recovery(student, net, evidence, 10)))
    for block in ("blocks.0", "blocks.2", "blocks.3"):
        for part in ("mlp.fc2.weight", "attn.proj.weight"):
            path = f"{block}.{part}"
            assert torch.equal(student.get_parameter(path), net.get_parameter(path)), path


@pytest.mark.parametrize("fine_tune", [False, True])
def test_a_recovery_of_the_whole_network_comes_last(fine_tune: bool) -> None:
    net = randomise(deep_net())
    method, _ = composed(
        "target.macs=0.8", "method.reconstruct=false", f"method.fine_tune={str(fine_tune).lower()}"
    )
    evidence = Evidence(block_scores={f"blocks.{i}": float(i) for i in range(1, 5)})
    student = cut(net, Plan(model={}, edits=(Drop(branch="blocks.2.attn"),)))
    phases = [*method.recovery(student, net, evidence, 10)]
    assert [type(phase) for phase in phases] == [Mimic, *([Recovery] if fine_tune else [])]
    expected = AllButHeldOut(of=phases[-1].calibration_images) if fine_tune else None
    assert phases[0].calibration_images == expected


def small_swin() -> nn.Module:
    """Return a random Swin: maps of 8x8 and 4x4 tokens in windows of 4x4."""
    return randomise(
        timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            embed_dim=12,
            depths=(4, 5),
            num_heads=(2, 3),
            num_classes=7,
        )
    )


@pytest.mark.parametrize(
    ("group_size", "protected", "stages"),
    [(1, 1, [1, 2, 18, 1]), (2, 1, [0, 1, 9, 0]), (2, 0, [1, 1, 9, 1]), (4, 0, [0, 0, 4, 0])],
)
def test_successive_blocks_of_a_stage_are_one_candidate(
    group_size: int, protected: int, stages: list[int]
) -> None:
    described = cost_of(SWIN).structure
    blocks = [*blocks_of(described)]
    groups = groups_of(described, blocks[protected : len(blocks) - protected], group_size)
    assert [sum(f"layers.{i}" in group[0] for group in groups) for i in range(4)] == stages
    for group in groups:
        positions = [blocks.index(block) for block in group]
        assert positions == [*range(positions[0], positions[0] + group_size)]
        assert int(group[0].rpartition(".")[2]) % group_size == 0


@pytest.mark.parametrize("budget", ["strength=1.5", "strength=2.5", "target.params=0.7"])
def test_pairs_lose_both_attentions_and_the_same_share_of_units(budget: str) -> None:
    net, (method, target) = small_swin(), composed(budget, "method.group_size=2")
    cost = Cost(net, 32)
    proposal = method.plan(net, Evidence(), cost, target)
    plan, limit = plan_from(proposal), cost.limit(target)
    assert 0 <= limit - cost.plan(plan).of(target.counted_metric) < 2 * 12 * 8 * 8
    blocks = proposal.notes["blocks"]
    expected = [f"layers.{i}.blocks.{j}" for i, j in ((0, 2), (0, 3), (1, 0), (1, 1))]
    assert blocks == expected[: len(blocks)]
    assert len(blocks) in (2, 4)
    assert [edit.branch for edit in plan.drops()] == [f"{block}.attn" for block in blocks]
    shares = [
        width / (48 << int(block.split(".")[1]))
        for block, width in zip(blocks, proposal.notes["widths"], strict=True)
    ]
    assert max(shares) - min(shares) < 1.01 / 48
    small = cut(net, plan)
    assert count(small, 32)[:2] == cost.plan(plan)[:2]
    assert bool(torch.isfinite(small(torch.ones(1, 3, 32, 32))).all())


def test_extra_is_in_pairs_and_so_are_attentions_that_stay() -> None:
    cost = Cost(small_swin(), 32)
    order = groups_of(cost.structure, [*blocks_of(cost.structure)], 2)
    few, dropped = narrowed(cost, Target(metric="blocks", keep=1), order)
    more, _ = narrowed(cost, Target(metric="blocks", keep=1), order, extra=2)
    assert (len(few), len(more)) == (2, 6)
    assert dropped == list(order[0])
    little, dropped = narrowed(cost, Target(metric="blocks", keep=0.1), order)
    assert (list(little), dropped) == (list(order[0]), [])


@pytest.mark.parametrize(
    ("allowed", "blocks"),
    [("layers.1.blocks.3", (2, 3)), ("layers.1.blocks.0", (0, 1))],
)
def test_a_pair_is_allowed_by_one_of_its_blocks(allowed: str, blocks: tuple[int, int]) -> None:
    net = small_swin()
    method, target = composed(
        "target.blocks=1", "method.group_size=2", f"method.allowed_blocks=[{allowed}]"
    )
    proposal = method.plan(net, Evidence(), Cost(net, 32), target)
    assert proposal.notes["blocks"] == [f"layers.1.blocks.{at}" for at in blocks]


def test_pairs_of_the_papers_accounting_in_swin() -> None:
    cost = cost_of(SWIN)
    _, block, blocks = paper_macs(cost)
    order = groups_of(cost.structure, [*blocks_of(cost.structure)][1:-1], 2)
    widths = paper_widths(cost, Target(metric="blocks", keep=4), order[1:])
    attention, mlp = blocks["layers.2.blocks.0"]
    ratio = 1 - (4 * block - 6 * attention) / (6 * mlp)
    assert list(widths) == [f"layers.2.blocks.{at}" for at in range(6)]
    assert list(widths.values()) == [int(2048 * ratio)] * 6


DIGITS_SWIN = (
    *swin("[2,4]"),
    "method=dcvit",
    "method.group_size=2",
    "method.protected=[2,0]",
    "method.accounting=paper",
    "target.blocks=2.5",
)
"""Two pairs to choose from, in the second stage; both are needed, with equal widths."""


@pytest.mark.slow
def test_pairs_are_tried_and_compressed_one_after_the_other(command: Command) -> None:
    done = command(*DIGITS_SWIN, *QUICK, "data=none")
    (width,) = set(provenance(done)["widths"])
    both = {"cut", "refit", "mimic", "mimic-2"}
    steps = both, both | {"refit-2"}
    for share, stages in zip((width / 96, 0.9), steps, strict=True):
        trained = ("method.trial.training.epochs=1", f"method.trial.width={share}")
        done = command(*DIGITS_SWIN, *QUICK, "method.tuning.training.epochs=1", *trained)
        assert done.code == 0, done.output
        scores = trials(done)
        first, second = sorted(scores, key=lambda block: scores[block])
        assert {first, second} == {"layers.1.blocks.0", "layers.1.blocks.2"}
        assert provenance(done)["blocks"] == [
            f"{start[:-1]}{int(start[-1]) + at}" for start in (first, second) for at in (0, 1)
        ]
        report = json.loads(done.report.read_text())
        assert set(report["stages"]) == stages  # the best trial is a step, if its width fits


def whole(*more: str) -> tuple[str, ...]:
    return ("method.drop_mlps=true", "method.reconstruct=false", "method.group_size=2", *more)


@pytest.mark.parametrize(
    ("budget", "pairs"),
    [
        (("target.blocks=4",), 2),
        (("target.blocks=4", "method.accounting=paper"), 2),
        (("target.blocks=3",), 2),
        (("target.macs=0.82", "method.accounting=paper"), 3),
        (("target.macs=0.82",), 3),
        (("target.params=0.8",), 3),
    ],
)
def test_pairs_of_swin_go_whole_where_that_is_asked_for(
    budget: tuple[str, ...], pairs: int
) -> None:
    cost = cost_of(SWIN)
    method, target = composed(*whole(*budget))
    order = groups_of(cost.structure, [*blocks_of(cost.structure)][1:-1], 2)[::-1]
    scores = {group[0]: float(at) for at, group in enumerate(order)}
    proposal = method.plan(skeleton_net(SWIN), Evidence(block_scores=scores), cost, target)
    blocks = proposal.notes["blocks"]
    assert blocks == flatten(order[:pairs])
    assert proposal.notes["widths"] == []
    branches = {f"{block}.{part}" for block in blocks for part in ("attn", "mlp")}
    assert {edit.branch for edit in plan_from(proposal).drops()} == branches
    assert len(proposal.edits) == len(branches)


def test_the_papers_row_of_swin_loses_two_pairs() -> None:
    method, target = composed("experiment=dcvit/table5_swin", "data.root=anywhere")
    cost = cost_of(SWIN)
    proposal = method.plan(skeleton_net(SWIN), Evidence(), cost, target)
    parts = Counter(edit.branch.rpartition(".")[2] for edit in plan_from(proposal).drops())
    assert parts == {"attn": 4, "mlp": 4}
    assert len(proposal.edits) == 8


def test_whole_pairs_are_tried_and_the_best_is_the_first_step(command: Command) -> None:
    trained = ("method.trial.training.epochs=1", "method.tuning.training.epochs=1")
    where = tuple(w for w in DIGITS_SWIN if "blocks" not in w)
    done = command(*where, *QUICK, *whole("target.blocks=4"), *trained)
    assert done.code == 0, done.message
    assert set(json.loads(done.report.read_text())["stages"]) == {"cut", "mimic", "mimic-2"}
    assert provenance(done)["reused_trial"] == provenance(done)["blocks"][0]


def test_a_width_that_is_not_set_follows_from_the_target(command: Command) -> None:
    trained = ("method.trial.training.epochs=1", "target.macs=0.6", *SHORT)
    done = command("method=dcvit", *trained, "method.trial.width=null")
    assert done.code == 0, done.message
    assert provenance(done)["widths"] == [80, 79]
    assert provenance(done)["reused_trial"] == provenance(done)["blocks"][0]
    assert set(json.loads(done.report.read_text())["stages"]) == {
        *("cut", "mimic"),
        *("refit", "mimic-2"),
    }
    other = command("method=dcvit", *trained, "method.trial.width=0.5", "method.progressive=true")
    assert provenance(other)["reused_trial"] is None
    assert "another shape than the first step" in other.output


def test_trials_of_the_targets_width_are_those_of_each_candidate() -> None:
    net = deep_net()
    cost = Cost(net, 32)
    method, target = composed("target.macs=0.7", "method.trial.width=null")
    width = method.scorer_for(net, cost, target).compression.width
    assert not isinstance(width, float)
    for block, shape in width.items():
        order = [(block,), *(group for group in singles(cost) if group != (block,))]
        widths, _ = narrowed(cost, target, order)
        assert shape.widths == {block: widths[block]}
        assert shape.removed == [block]
    with pytest.raises(ConfigError, match="follows from a target"):
        method.scorer(net)
    shared, same = (
        composed(f"target.macs={keep}")[0].scorer_for(net, cost, target).settings
        for keep in (0.7, 0.8)
    )
    assert shared == same


@pytest.mark.parametrize(
    ("words", "revision"),
    [
        ((), 1),
        (("method.trial.training.epochs=1", "method.tuning.pooled_weight=0"), 1),
        (("method.trial.training.epochs=1",), 2),
        (("method.tuning.mimic=class",), 1),
        (("method.tuning.mimic=class", "method.trial.training.epochs=1"), 2),
        (("method.judging_set=synthetic",), 1),
        (("method.judging_set=synthetic", "seed=1"), 2),
        (("method.unit_selection=none", "method.reconstruct=false"), 2),
    ],
)
def test_settings_that_mean_something_else_than_before_are_of_another_revision(
    words: tuple[str, ...], revision: int
) -> None:
    assert composed(*words)[0].revision == revision

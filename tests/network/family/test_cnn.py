"""ResNet and MobileNetV2: their channels and blocks cut, masked, counted, combined and saved."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import BatchNorm2d

from command import Command
from fresh import python
from nets import images, outputs, plans, randomise, relative_error, skeleton_net
from vitrim import Drop, Keep, LowRank, Plan, combine, count, cut, load, masked, save
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.budget.trim import trim
from vitrim.method.vtp import GateTraining
from vitrim.network import UnsupportedArchitecture, branches, sites, stream, structure
from vitrim.network.structure import members
from vitrim.plan import PlanError, dumps, loads
from vitrim.trainer.recipe import Recipe

SMALL = {"layers": [2, 2, 1, 2], "channels": [6, 8, 8, 10], "num_classes": 7}
MODELS: dict[str, dict[str, Any]] = {
    "BasicBlock": {"name": "resnet18", "args": SMALL},
    "Bottleneck": {"name": "resnet50", "args": SMALL},
    "InvertedResidual": {
        "name": "mobilenetv2_035",
        "args": {"depth_multiplier": 0.5, "num_classes": 7},
    },
}
KINDS = {
    "BasicBlock": {"conv1"},
    "Bottleneck": {"conv1", "conv2"},
    "InvertedResidual": {"conv_pw"},
}
BRANCHES = {
    "BasicBlock": ("layer1.1", "layer2.1", "layer4.1"),
    "Bottleneck": ("layer1.1", "layer2.1", "layer4.1"),
    "InvertedResidual": ("blocks.2.1", "blocks.3.1", "blocks.4.1", "blocks.5.1"),
}
family = pytest.mark.parametrize("kind", MODELS)
families = st.sampled_from([*MODELS])


def small_cnn(model: dict[str, Any], *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a random network in eval mode with random statistics of its norms."""
    net = randomise(timm.create_model(model["name"], **model["args"]).to(dtype))
    generator = torch.Generator().manual_seed(2)
    for module in net.modules():
        if isinstance(module, BatchNorm2d):
            shape = module.running_mean.shape
            noise = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
            module.running_mean.copy_(0.4 * noise[0] - 0.2)
            module.running_var.copy_(0.5 + noise[1])
            module.num_batches_tracked.fill_(5)
    return net


@cache
def net(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return small_cnn(MODELS[kind], dtype=dtype)


@cache
def cost(kind: str) -> Cost:
    return Cost(net(kind), 32)


def fitting(dense: nn.Module, model: dict[str, Any], dropped: Collection[str], plan: Plan) -> Plan:
    """Return the plan that drops branches and keeps those slices that are not inside."""
    inside = members(structure(dense), dropped)
    keeps = (keep for keep in plan.keeps() if keep.site not in inside)
    return Plan(model=model, edits=(*(Drop(branch=b) for b in sorted(dropped)), *keeps))


@st.composite
def cnn_plans(draw: st.DrawFn, dense: nn.Module, model: dict[str, Any]) -> Plan:
    """Draw any plan that fits: any branches dropped, any channels elsewhere."""
    dropped = draw(st.sets(st.sampled_from(names))) if (names := branches(dense)) else set()
    return fitting(dense, model, dropped, draw(plans(sites(dense), model)))


def half(kind: str, *, drop: bool = True) -> Plan:
    """Keep every other channel everywhere, and drop the last branch."""
    kept = {name: tuple(range(0, site.size, 2)) for name, site in sites(net(kind)).items()}
    keeps = tuple(Keep(site=name, index=index) for name, index in kept.items())
    dropped = BRANCHES[kind][-1:] if drop else ()
    return fitting(net(kind), MODELS[kind], dropped, Plan(model={}, edits=keeps))


def silenced(dense: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    """Return the outputs of `dense` where the activations that the plan removes are set to zero.

    An oracle of its own: it knows timm's modules and nothing of vitrim.
    """
    reader = {"conv1": "conv2", "conv2": "conv3", "conv_pw": "conv_pwl"}
    handles = []
    for keep in plan.keeps():
        block, name, _ = keep.site.rsplit(".", 2)
        conv = dense.get_submodule(f"{block}.{reader[name]}")
        mask = torch.zeros(conv.in_channels, 1, 1, dtype=x.dtype)
        mask[list(keep.index)] = 1.0
        handles.append(conv.register_forward_pre_hook(lambda _, args, m=mask: (args[0] * m,)))
    for edit in plan.drops():
        block = dense.get_submodule(edit.branch)
        handles.append(block.register_forward_hook(lambda _, args, out: args[0]))
    try:
        return outputs(dense, x)
    finally:
        for handle in handles:
            handle.remove()


@given(kind=families, data=st.data())
def test_cut_equals_masked_and_silenced_and_counts_what_the_formula_says(
    kind: str, data: st.DataObject
) -> None:
    plan, x = data.draw(cnn_plans(net(kind), MODELS[kind])), images()
    compact = cut(net(kind), plan)
    actual = outputs(compact, x)
    assert relative_error(actual, outputs(masked(net(kind), plan), x)) <= 1e-12
    assert relative_error(actual, silenced(net(kind), plan, x)) <= 1e-12
    assert cost(kind).plan(plan)[:2] == count(compact, 32)[:2]
    assert Cost(compact, 32).plan(Plan(model={}, edits=()))[:2] == count(compact, 32)[:2]
    dropped = {edit.branch for edit in plan.drops()}
    assert branches(compact) == tuple(b for b in BRANCHES[kind] if b not in dropped)
    assert loads(dumps(plan)) == plan


@family
def test_what_is_cut_matters_and_is_not_there_any_more(kind: str) -> None:
    plan, x = half(kind), images()
    compact, dense = cut(net(kind), plan), net(kind)
    assert relative_error(outputs(compact, x), outputs(dense, x)) > 1e-3
    assert {name.split(".")[-2] for name in sites(dense)} == KINDS[kind]
    for name, site in sites(compact).items():
        conv = compact.get_submodule(name.removesuffix(".channels"))
        assert (
            conv.out_channels == len(conv.weight) == site.size == -(-sites(dense)[name].size // 2)
        )
    for module in compact.modules():
        if isinstance(module, BatchNorm2d):
            sizes = {len(t) for t in (module.weight, module.running_mean, module.running_var)}
            assert sizes == {module.num_features}
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[1] * module.groups == module.in_channels
            assert module.weight.is_contiguous()


@family
def test_a_dropped_block_is_the_identity(kind: str) -> None:
    dropped = BRANCHES[kind]
    plan = Plan(model={}, edits=tuple(Drop(branch=branch) for branch in dropped))
    compact, x = cut(net(kind), plan), images()
    assert branches(compact) == ()
    assert all(type(compact.get_submodule(branch)) is nn.Identity for branch in dropped)
    assert relative_error(outputs(compact, x), outputs(masked(net(kind), plan), x)) <= 1e-12


def test_a_resnet_without_relu_has_channels_but_no_branches() -> None:
    model = {"name": "resnet18", "args": {**SMALL, "act_layer": "silu"}}
    dense, x = small_cnn(model), images()
    assert branches(dense) == ()
    kept = tuple(Keep(site=name, index=(0, 2)) for name in sites(dense))
    plan = Plan(model=model, edits=kept)
    actual = outputs(cut(dense, plan), x)
    assert relative_error(actual, outputs(masked(dense, plan), x)) <= 1e-12


def test_one_channel_may_be_left_of_a_depthwise_convolution() -> None:
    dense, x = net("InvertedResidual"), images()
    plan = Plan(model={}, edits=tuple(Keep(site=name, index=(3,)) for name in sites(dense)))
    compact = cut(dense, plan)
    assert relative_error(outputs(compact, x), outputs(masked(dense, plan), x)) <= 1e-12
    assert [*sites(compact)] == [*sites(dense)]
    assert Cost(compact, 32).plan(Plan(model={}, edits=()))[:2] == count(compact, 32)[:2]


@given(kind=families, data=st.data())
def test_two_cuts_equal_one_by_the_composed_plan(kind: str, data: st.DataObject) -> None:
    dense, model = net(kind), MODELS[kind]
    first = data.draw(cnn_plans(dense, model))
    once = cut(dense, first)
    second = data.draw(cnn_plans(once, model))
    twice, plan = cut(once, second), combine(dense, first, second)
    together = cut(dense, plan)
    expected = twice.state_dict()
    assert together.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in together.state_dict().items())
    assert count(twice, 32)[:2] == cost(kind).plan(plan)[:2]


@family
@pytest.mark.parametrize("make", [cut, masked])
def test_the_input_is_untouched_and_shares_no_memory(kind: str, make: Any) -> None:
    dense = small_cnn(MODELS[kind])
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    twin = make(dense, half(kind))
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


@family
def test_nothing_removed_is_bit_identical(kind: str) -> None:
    dense, x = net(kind, torch.float32), images(dtype=torch.float32)
    assert torch.equal(outputs(cut(dense, Plan(model={}, edits=())), x), outputs(dense, x))


READ = """
import sys, torch, safetensors.torch, vitrim
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    net, plan = vitrim.load(folder)
    with torch.no_grad():
        logits = net(safetensors.torch.load_file(folder + "/x")["x"])
    safetensors.torch.save_file({"logits": logits, **net.state_dict()}, folder + "/read")
"""


def test_another_process_reads_the_same_network_to_the_bit(tmp_path: Path) -> None:
    x = images(dtype=torch.float32)
    folders = {kind: tmp_path / kind for kind in MODELS}
    for kind, folder in folders.items():
        save(folder, cut(net(kind, torch.float32), half(kind)), half(kind))
        safetensors.torch.save_file({"x": x}, folder / "x")
    done = python("-c", READ, *(str(folder) for folder in folders.values()))
    assert done.returncode == 0, done.stderr
    for kind, folder in folders.items():
        compact, loaded = cut(net(kind, torch.float32), half(kind)), load_file(folder / "read")
        with torch.no_grad():
            assert torch.equal(loaded.pop("logits"), compact(x))
        expected = compact.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())
        assert {int(v) for n, v in loaded.items() if n.endswith("num_batches_tracked")} == {5}


def load_file(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


@family
def test_the_meta_device_gives_the_same_shapes(kind: str) -> None:
    small = cut(skeleton_net(MODELS[kind]["name"], **MODELS[kind]["args"]), half(kind))
    expected = {name: t.shape for name, t in cut(net(kind), half(kind)).state_dict().items()}
    assert {name: tensor.shape for name, tensor in small.state_dict().items()} == expected
    assert all(tensor.is_meta for tensor in small.state_dict().values())


@family
@pytest.mark.parametrize("training", [False, True])
def test_every_parameter_left_gets_a_gradient_and_keeps_its_mode(kind: str, training: bool) -> None:
    dense = small_cnn(MODELS[kind]).train(training)
    compact = cut(dense, half(kind))
    assert {module.training for module in compact.modules()} == {training}
    compact(images(64, batch=4)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in compact.parameters())
    counted = {int(t) for n, t in compact.named_buffers() if n.endswith("num_batches_tracked")}
    assert counted == {6 if training else 5}


@family
@pytest.mark.parametrize("metric", ["macs", "params", "units"])
def test_budgets_are_met_to_within_a_channel(kind: str, metric: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.rand(site.size, generator=generator) for name, site in sites(net(kind)).items()
    }
    target = Target(metric=metric, keep=0.95)
    edits = trim(cost(kind), scores, target)
    compact = cut(net(kind), Plan(model={}, edits=edits))
    reached = cost(kind).plan(Plan(model={}, edits=edits), [*scores])
    limit = cost(kind).limit(target, [*scores])
    assert 0.99 * limit < getattr(reached, metric) <= limit
    assert count(compact, 32)[:2] == reached[:2]


@family
def test_factors_of_convolutions_are_refused(kind: str) -> None:
    layers = [layer.name for layer in structure(net(kind)).layers]
    assert len(layers) >= 6
    for name in layers[:6]:
        plan = Plan(model={}, edits=(LowRank(linear=name, rank=1),))
        for make in (cut, masked, lambda dense, plan: cost(kind).plan(plan)):
            with pytest.raises(PlanError, match=rf"'{name}' cannot be factorised: it is a"):
                make(net(kind), plan)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("seresnet50", "SEModule as se"),
        ("resnext50_32x4d", "Conv2d as conv2"),
        ("resnetblur50", "BlurPool2d as aa"),
        ("efficientnet_b0", "SqueezeExcite as se"),
        ("efficientnet_es", "EdgeResidual"),
        ("mobilenetv3_small_100", "MobileNetV3 cannot be cut.*EfficientNet.*ResNet"),
    ],
)
def test_blocks_with_more_to_them_are_refused(name: str, named: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=named):
        structure(skeleton_net(name))


@family
def test_there_is_no_stream_of_tokens(kind: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match="no residual stream of tokens"):
        stream(net(kind))


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("resnet34", 21_797_672, 3_663_761_408),
        ("resnet50", 25_557_032, 4_089_184_256),
        ("mobilenetv2_100", 3_504_872, 300_774_272),
    ],
)
def test_the_numbers_of_the_real_networks(name: str, params: int, macs: int) -> None:
    amount = Cost(skeleton_net(name), 224).plan(Plan(model={}, edits=()))
    assert amount[:2] == (params, macs)


@family
def test_gates_multiply_the_channels_and_are_folded_in(kind: str) -> None:
    recipe = Recipe(epochs=1, lr=0.0, weight_decay=0.0, warmup_epochs=0.0, clip_norm=0.0)
    phase = GateTraining(small_cnn(MODELS[kind]), recipe=recipe, l1=0.0, gate_lr=0.0).eval()
    x = images()
    with torch.no_grad():
        dense = phase(x)
        for gate in phase.gates:
            gate.copy_(torch.linspace(-1, 2, len(gate)))
        gated = phase(x)
        assert phase.evidence().scores.keys() == sites(phase.net).keys()
        assert relative_error(phase.net(x), gated) <= 1e-12
    assert relative_error(gated, dense) > 1e-3


DIGITS = (
    "model=resnet34",
    "model.name=resnet18",
    "model.num_classes=10",
    "model.image_size=8",
    "+model.args.layers=[1,2,2,1]",
    "+model.args.channels=[8,8,8,8]",
    "+model.args.in_chans=1",
    "model.mean=[0.5]",
    "model.std=[0.5]",
    "model.training.epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.log_every_n_steps=1",
    "latency.repeats=1",
    "tracking=none",
    "progress=false",
)
BY_WEIGHT = (
    "method=oneshot",
    "method.sites=[channels]",
    "method.criterion=magnitude",
    "method.compensation=none",
)

DENSE = ("method=dcvit", "method.protected=[0,0]", "method.tuning.training.epochs=1")


@pytest.mark.parametrize(
    "method",
    [
        (*BY_WEIGHT, "method.fine_tune=true", "method.tuning.training.epochs=1"),
        ("method=vtp", "method.gating.epochs=1", "method.fine_tuning.epochs=1"),
        ("method=fskd",),
        ("method=cd", "method.fine_tuning.epochs=1"),
        (
            *("method=practise", "target.macs=0.99", "method.tuning.epochs=1"),
            "method.adaptor_training.iterations=1",
        ),
        ("method=mir", "target.macs=0.99", "method.tuning.epochs=1"),
        (*DENSE, "target.blocks=1"),
        (*DENSE, "target.blocks=1", "method.trial.training.epochs=1"),
    ],
    ids=["oneshot", "vtp", "fskd", "cd", "practise", "mir", "dcvit", "dcvit-trained"],
)
def test_a_run_gets_from_yaml_to_report(command: Command, method: Any) -> None:
    done = command(*DIGITS, *method, "strength=3")
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    assert report["compact"]["params"] < report["dense"]["params"]
    compact, plan = load(done.report.parent)
    assert plan.edits
    assert compact(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (("method=oneshot",), "method.sites=['mlp']: expected what this network has, channels"),
        (("method=oneshot", "method.sites=[channels]"), "no residual stream of tokens"),
        (
            ("method=oneshot", "method.sites=[channels]", "target.blocks=1"),
            "no residual stream of tokens",
        ),
        ((*BY_WEIGHT, "method.compensation=ridge"), "no residual stream of tokens"),
        (("method=mixed_rank",), "this network has none that can be factorised"),
        (
            (*DENSE, "method.extra_blocks=1"),
            "method.extra_blocks=1: this network has no attentions",
        ),
        ((*DENSE, "method.group_size=2"), "method.group_size=2: this network has no attentions"),
        ((*DENSE, "method.accounting=paper"), "method.accounting=paper: this network has no"),
        ((*DENSE, "+model.args.act_layer=gelu"), "nor any that could be dropped as a whole"),
        (
            ("method=dcvit", "target.blocks=1"),
            "no stage has 1 successive blocks that are not protected",
        ),
    ],
)
def test_what_needs_tokens_is_refused_before_any_training(
    command: Command, method: tuple[str, ...], message: str
) -> None:
    done = command(*DIGITS, *method, "strength=3")
    assert done.code == 1
    assert message in done.message
    assert not (command.out / "phases").exists()


def test_dense_compression_drops_block_after_block(command: Command) -> None:
    words = (*DIGITS, *DENSE, "+model.args.layers=[1,2,2,2]", "strength=3")
    first = command(*words, "target.blocks=1", "method.allowed_blocks=[layer3.1]")
    assert json.loads(first.report.read_text())["stages"].keys() == {"cut", "mimic"}
    plain, begun = (
        command(*words, "target.blocks=2", *begin)
        for begin in ((), ("method.trial.training.epochs=1",))
    )
    on = command(*words, "target.blocks=2", f"from_run={first.report.parent}")
    for done, stages in (
        (plain, {"cut", "mimic", "mimic-2"}),
        (begun, {"cut", "mimic", "mimic-2"}),  # the best trial is the first step
        (on, {"cut", "mimic"}),
    ):
        assert done.code == 0, done.message
        compact, plan = load(done.report.parent)
        dropped = [edit.branch for edit in plan.drops()]
        assert len(dropped) == len(plan.edits) == 2
        assert all(type(compact.get_submodule(name)) is nn.Identity for name in dropped)
        assert json.loads(done.report.read_text())["stages"].keys() == stages
    assert "layer3.1" in dropped


@pytest.mark.parametrize("words", ["model.mean=[0.5,0.5]", "model.std=[0.0]", "model.std=[a]"])
def test_pixels_that_cannot_be_normalised_are_refused(command: Command, words: str) -> None:
    done = command(*DIGITS, *BY_WEIGHT, words)
    assert done.code == 1
    assert f"{words.split('=')[0]}=" in done.message
    assert "expected 1 numbers" in done.message


def test_a_checkpoint_may_lack_the_counters_of_its_norms(tmp_path: Path, command: Command) -> None:
    args = {"layers": [1, 2, 2, 1], "channels": [8, 8, 8, 8], "in_chans": 1, "num_classes": 10}
    dense = timm.create_model("resnet18", **args)
    state = {n: t for n, t in dense.state_dict().items() if not n.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state, tmp_path / "dense.safetensors")
    where = f"model.checkpoint={tmp_path / 'dense.safetensors'}"
    done = command(*DIGITS, *BY_WEIGHT, where, "strength=0")
    assert done.code == 0, done.message
    loaded = load(done.report.parent)[0].state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())

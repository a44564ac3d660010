from __future__ import annotations

import json
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import EVERY_IMAGE, QUICK, Command
from nets import MODEL, images, plan_of, relative_error, small_net
from refusals import TINY, assert_refused
from vitrim import Int8, Keep, LowRank, Plan, cut, load
from vitrim.cli.report import main
from vitrim.deploy.quantize import (
    SCHEMES,
    SMOOTH,
    Quantized,
    check,
    in_int8,
    is_exact,
    megabytes,
    report_entries,
)
from vitrim.errors import ConfigError
from vitrim.method.oneshot import OneShot
from vitrim.network import int8_linear
from vitrim.network.attention import GatheredLinear, SlicedAttention
from vitrim.network.int8 import linears_of
from vitrim.network.int8_linear import Int8Linear, to_int8
from vitrim.plan import Proposal

CUT = plan_of(
    {
        "blocks.0.attn.input": (0, 3, 5, 23),
        "blocks.0.attn.qk": (0, 1, 9),
        "blocks.0.attn.v": (1, 2, 3, 20),
        "blocks.0.mlp.hidden": (7,),
        "blocks.1.attn.heads": (0, 2),
        "blocks.1.mlp.input": (11,),
        "blocks.1.mlp.hidden": tuple(range(31)),
    }
)
"""Ragged heads, gathered inputs, odd widths, and Linears with a single input of either kind."""


KERNELS = [
    pytest.param(False, id="float32"),
    pytest.param(
        True,
        id="int8",
        marks=pytest.mark.skipif(not is_exact(), reason="this processor's int8 products overflow"),
    ),
]
"""What multiplies integers: float32 matrices, or torch's int8 kernel, where it is exact."""


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers (rows, width) and the scales (rows, 1) of symmetric int8, in float."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return (x / scale).round(), scale


def linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(in_features)
    layer = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(net: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = net(x)
    return result


def vit() -> nn.Module:
    return small_net(dtype=torch.float32, embed_dim=48, num_classes=10)


def int8(layer: nn.Module, scheme: str) -> nn.Module:
    return to_int8(layer, dynamic=scheme == "int8_dynamic")


def quantized(net: nn.Module, scheme: str) -> nn.Module:
    return in_int8(net, Plan(model=MODEL, edits=()), scheme, seen())[0]


def seen() -> list[Tensor]:
    return [images(dtype=torch.float32, batch=8)]


@pytest.mark.parametrize("widths", [(17, 5), (1, 3), (1, 1), (64, 192), (577, 10)], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_weight_only_is_the_product_with_rounded_weights(
    widths: tuple[int, int], shape: tuple[int, ...], bias: bool
) -> None:
    layer, x = linear(*widths, bias=bias), inputs(*shape, widths[0])
    weight, scale = rounded(layer.weight.detach())
    output = logits(int8(layer, "int8_weight_only"), x)
    expected = logits(lambda x: F.linear(x, weight * scale, layer.bias), x)  # type: ignore[arg-type]
    assert output.shape == expected.shape
    assert relative_error(output, expected) < 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("widths", [(17, 5), (1, 3), (1, 1), (64, 192), (3072, 10)], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_is_the_product_of_rounded_weights_and_tokens(
    monkeypatch: pytest.MonkeyPatch,
    widths: tuple[int, int],
    shape: tuple[int, ...],
    bias: bool,
    kernel: bool,
) -> None:
    monkeypatch.setattr(int8_linear, "has_kernel", lambda *_: kernel)
    layer, x = linear(*widths, bias=bias), inputs(*shape, widths[0])
    weight, scale = rounded(layer.weight.detach())
    tokens, scale_of_token = rounded(x)
    output = logits(int8(layer, "int8_dynamic"), x)
    with torch.no_grad():
        expected = F.linear((tokens * scale_of_token).double(), (weight * scale).double())
        expected = expected + (layer.bias if layer.bias is not None else 0)
        half_x, half_w = scale_of_token / 2, scale.flatten() / 2  # the most that rounding moves
        sum_x, sum_w = x.abs().sum(-1, keepdim=True), layer.weight.abs().sum(-1)
        bound = half_x * sum_w + half_w * sum_x + widths[0] * half_x * half_w
        gap = (output - layer(x)).abs()
    assert output.shape == expected.shape
    assert relative_error(output, expected) < 1e-5
    assert (gap <= bound + 1e-5).all()
    assert gap.max() > 0 or widths[0] == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_dynamic_products_do_not_overflow(monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    monkeypatch.setattr(int8_linear, "has_kernel", lambda *_: kernel)
    layer = nn.Linear(3072, 8, bias=False)
    nn.init.ones_(layer.weight)
    layer = int8(layer, "int8_dynamic")
    for sign in (1.0, -1.0):
        output = logits(layer, torch.full((2, 3072), sign))
        assert relative_error(output, torch.full((2, 8), 3072 * sign)) < 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_vit_answers_nearly_as_before(scheme: str) -> None:
    net, x = vit(), images(dtype=torch.float32, batch=64)
    before, after = logits(net, x), logits(quantized(net, scheme), x)
    assert (before.argmax(-1) == after.argmax(-1)).float().mean() >= 0.95
    assert relative_error(after, before) < 0.05
    assert not torch.equal(before, after)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cut_net_answers_nearly_as_before(scheme: str) -> None:
    net, x = cut(small_net(dtype=torch.float32), CUT), images(dtype=torch.float32, batch=64)
    kinds = {type(module) for module in net.modules()}
    assert {GatheredLinear, SlicedAttention} <= kinds
    single = [n for n, m in net.named_modules() if type(m) is nn.Linear and m.in_features == 1]
    assert {name.endswith(".linear") for name in single} == {True, False}, "gathered or not"
    before, after = logits(net, x), logits(quantized(net, scheme), x)
    assert (before.argmax(-1) == after.argmax(-1)).float().mean() >= 0.95
    assert relative_error(after, before) < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rank", [1, 7])
def test_low_rank_layers_answer_nearly_as_before(scheme: str, rank: int) -> None:
    layers = ("blocks.0.attn.qkv.q", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.mlp.fc2")
    edits = tuple(LowRank(linear=layer, rank=rank) for layer in layers)
    net = cut(small_net(dtype=torch.float32), Plan(model=MODEL, edits=edits))
    x = images(dtype=torch.float32, batch=64)
    assert relative_error(logits(quantized(net, scheme), x), logits(net, x)) < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_mixed_precision_evaluates_too(scheme: str) -> None:
    net, x = vit(), images(dtype=torch.float32, batch=16)
    with torch.autocast("cpu", torch.bfloat16):
        after = logits(quantized(net, scheme), x)
    assert relative_error(after.float(), logits(net, x)) < 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("plan", [plan_of({}), CUT], ids=["dense", "cut"])
def test_every_linear_is_quantised_and_nothing_else(scheme: str, plan: Plan) -> None:
    dense = small_net(dtype=torch.float32)
    net, changed = in_int8(cut(dense, plan), plan, scheme, seen())
    layers = [module for module in net.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 2 * 4 + 1
    assert {layer.dynamic for layer in layers} == {scheme != "int8_weight_only"}
    assert not any(isinstance(module, nn.Linear) for module in net.modules())
    inside = {id(layer.weight_int8) for layer in layers}
    for parameter in net.parameters():
        assert (parameter.dtype == torch.int8) == (id(parameter) in inside)
    assert changed.edits[: len(plan.edits)] == plan.edits
    x = images(dtype=torch.float32)
    if scheme != SMOOTH:  # which changes norms, too
        assert torch.equal(logits(net, x), logits(cut(dense, changed), x))


def test_layers_that_are_int8_stay_as_they_are() -> None:
    plan = Plan(model=MODEL, edits=(Int8(linear="head"),))
    net, changed = in_int8(cut(vit(), plan), plan, "int8_dynamic")
    assert not net.get_submodule("head").dynamic
    assert len({edit.linear for edit in changed.int8s()}) == len([*changed.int8s()]) == 9
    assert {edit.linear for edit in changed.int8s()} == {*linears_of(vit())}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_input_is_left_alone(scheme: str) -> None:
    net = cut(small_net(dtype=torch.float32), CUT)
    kept = {name: (id(p), p.clone()) for name, p in net.named_parameters()}
    state, rng = [*net.modules()], torch.get_rng_state()
    copied = quantized(net, scheme)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [*net.modules()] == state
    for name, parameter in net.named_parameters():
        assert id(parameter) == kept[name][0]
        assert torch.equal(parameter, kept[name][1])
    shared = {p.data_ptr() for p in net.parameters()}
    assert all(t.data_ptr() not in shared for t in chain(copied.parameters(), copied.buffers()))


def test_megabytes_are_the_bytes_held() -> None:
    layer = linear(300, 100)
    assert megabytes(layer) == 4 * (300 * 100 + 100) / 1e6
    net = vit()
    weights = sum(m.weight.nbytes for m in net.modules() if isinstance(m, nn.Linear)) / 1e6
    for scheme in SCHEMES[:2]:  # integers, a scale, the bias in float
        assert megabytes(int8(linear(300, 100), scheme)) == (300 * 100 + 100 * (4 + 4)) / 1e6
        linears = megabytes(quantized(net, scheme)) - (megabytes(net) - weights)
        assert 0.25 * weights < linears < 0.29 * weights


def test_every_scheme_has_accuracy_megabytes_and_latency() -> None:
    net = vit()
    known, plan = {"top1": 50.0, "top5": 90.0, "images": 3}, Plan(model=MODEL, edits=())
    networks = {
        scheme: Quantized(*in_int8(net, plan, scheme), accuracy)
        for scheme, accuracy in zip(SCHEMES[:2], (known, None), strict=True)
    }
    entries: Any = report_entries(net, networks, [1.0, 2.0])
    assert entries["float_mb"] == megabytes(net)
    size = megabytes(networks["int8_dynamic"].net)
    assert entries["quantized"] == {
        "int8_weight_only": {"top1": 50.0, "top5": 90.0, "mb": size, "latency_ms": 1.0},
        "int8_dynamic": {"top1": None, "top5": None, "mb": size, "latency_ms": 2.0},
    }
    assert report_entries(net, {}, []) == {}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("quantize=[int4]", ["quantize=[int4]", "int8_weight_only", "int8_dynamic"]),
        ("quantize=int8_dynamic", ["quantize=int8_dynamic", "list", "[int8_weight_only"]),
        ("quantize=null", ["quantize=None", "list"]),
        ("quantize=[[]]", ["quantize=[[]]", "list"]),
        ("quantize=[int8_weight_only,int8_weight_only]", ["quantize=", "at most once"]),
        ("data=none quantize=[int8_dynamic_smooth]", ["needs training images"]),
    ],
)
def test_bad_schemes_are_refused_before_the_run(
    command: Command, argument: str, expected: list[str]
) -> None:
    assert_refused(command, *TINY, *argument.split(), expected=expected)


def test_an_unknown_scheme_lists_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match=r"scheme=int4: .*int8_weight_only, int8_dynamic"):
        quantized(vit(), "int4")


def test_a_processor_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrim.deploy.quantize.is_exact", lambda: False)
    check(["int8_weight_only"], accelerator="cpu")
    with pytest.raises(ConfigError, match=r"quantize=\[int8_dynamic\].*VNNI"):
        check(["int8_dynamic"], accelerator="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check(["int8_dynamic"], accelerator="gpu")


def test_a_run_reports_and_saves_the_int8_networks(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrim.deploy.quantize.is_exact", lambda: True)
    run = command(*TINY, EVERY_IMAGE, "strength=3", f"quantize=[{','.join(SCHEMES)}]")
    assert run.code == 0, run.message
    folder, report = run.report.parent, json.loads(run.report.read_text())
    net, plan = load(folder)
    assert report["float_mb"] == report["compact"]["mb"] == megabytes(net)
    assert [*report["quantized"]] == sorted(SCHEMES)
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for scheme, row in report["quantized"].items():
        saved, its_plan = load(folder / scheme)
        if scheme != SMOOTH:
            expected, _ = in_int8(net, plan, scheme)
            assert torch.equal(logits(saved, x), logits(expected, x))
        assert relative_error(logits(saved, x), logits(net, x)) < 0.05
        assert its_plan.in_float() == plan
        assert row["mb"] == megabytes(saved) < 0.4 * report["float_mb"]
        assert abs(row["top1"] - report["compact"]["top1"]) < 5
        assert 0 <= row["top1"] <= row["top5"] <= 100
        assert row["latency_ms"] > 0
    check_report(command, capsys)
    further = command(*TINY, "data=none", "strength=4", f"from_run={folder / 'int8_dynamic'}")
    assert further.code
    assert "has int8 layers" in further.message


def check_report(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(command.out), "--wandb", "disabled"])
    printed = capsys.readouterr().out.splitlines()
    assert "vit_digits on digits in int8" in printed
    rows = [line for line in printed if "int8_dynamic" in line or "int8_weight_only" in line]
    assert len(rows) == len(SCHEMES)
    assert max(map(len, rows)) <= 120
    text = (command.out / "report" / "report.md").read_text()
    assert "## In int8" in text
    assert text.count("| int8_") == len(SCHEMES)


def test_only_runs_that_quantise_get_another_folder(command: Command) -> None:
    structure = (*TINY, "data=none", "strength=0")
    plain = command(*structure).report
    asked = command(*structure, "quantize=[int8_weight_only]").report
    assert plain != asked
    assert "quantized" not in json.loads(plain.read_text())
    assert command(*structure, "quantize=[]").report == plain
    row = json.loads(asked.read_text())["quantized"]["int8_weight_only"]
    assert row["top1"] is None
    assert row["mb"] > 0


def test_int8_layers_of_a_method_are_made_after_the_recovery(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = (
        Keep(site="blocks.0.mlp.hidden", index=tuple(range(50))),
        LowRank(linear="blocks.1.attn.proj", rank=8),
        *(Int8(linear=name) for name in ("blocks.0.mlp.fc1", "blocks.1.attn.proj", "head")),
    )
    monkeypatch.setattr(OneShot, "plan", lambda *_: Proposal(edits=edits))
    quick = (*QUICK, "method.sampling.images=16", "method.fine_tune=true")
    done = command("method=oneshot", "strength=3", *quick)
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    net, plan = load(done.report.parent)
    assert plan.edits == edits
    assert {"cut", "refit", "int8"} <= report["stages"].keys()
    assert report["compact"]["top1"] == report["stages"]["int8"]["top1"]
    assert report["compact"]["mb"] == megabytes(net) < report["dense"]["mb"]
    assert net.get_submodule("head").weight_int8.dtype == torch.int8

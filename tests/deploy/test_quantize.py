from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import Command
from conftest import MODEL, images, plan_of, relative_error, small_net
from refusals import TINY, assert_refused
from vitrim import LowRank, Plan, cut, load
from vitrim.cli.report import main
from vitrim.deploy.quantize import (
    SCHEMES,
    check,
    evaluate_schemes,
    is_exact,
    megabytes,
    quantized,
)
from vitrim.errors import ConfigError
from vitrim.network.attention import GatheredLinear, SlicedAttention

if find_spec("torchao") is None:
    pytest.skip("torchao is not installed", allow_module_level=True)

needs_exact = pytest.mark.skipif(not is_exact(), reason="this processor's int8 products overflow")
EVALUATED = ["int8_weight_only", pytest.param("int8_dynamic", marks=needs_exact)]
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


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers (rows, width) and the scales (rows, 1) of symmetric int8, in float.

    The largest of a row is a tie, 127.5: it is multiplied by the inverse, as torchao does.
    """
    scale = (x.abs().amax(-1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    return (x * (1 / scale)).round().clamp(-128, 127), scale


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


@pytest.mark.parametrize("widths", [(17, 5), (1, 3), (1, 1), (64, 192), (577, 10)], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_weight_only_is_the_product_with_rounded_weights(
    widths: tuple[int, int], shape: tuple[int, ...], bias: bool
) -> None:
    layer, x = linear(*widths, bias=bias), inputs(*shape, widths[0])
    weight, scale = rounded(layer.weight.detach())
    output = logits(quantized(layer, "int8_weight_only"), x)
    expected = logits(lambda x: F.linear(x, weight * scale, layer.bias), x)  # type: ignore[arg-type]
    assert output.shape == expected.shape
    assert relative_error(output, expected) < 1e-5


@needs_exact
@pytest.mark.parametrize("widths", [(17, 5), (1, 3), (1, 1), (64, 192), (3072, 10)], ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_is_the_product_of_rounded_weights_and_tokens(
    widths: tuple[int, int], shape: tuple[int, ...], bias: bool
) -> None:
    layer, x = linear(*widths, bias=bias), inputs(*shape, widths[0])
    weight, scale = rounded(layer.weight.detach())
    tokens, scale_of_token = rounded(x)
    output = logits(quantized(layer, "int8_dynamic"), x)
    with torch.no_grad():
        expected = F.linear((tokens * scale_of_token).double(), (weight * scale).double())
        expected = expected + (layer.bias if layer.bias is not None else 0)
        half_x, half_w = scale_of_token / 2, scale.flatten() / 2  # the most that rounding moves
        sum_x, sum_w = x.abs().sum(-1, keepdim=True), layer.weight.abs().sum(-1)
        bound = half_x * sum_w + half_w * sum_x + widths[0] * half_x * half_w
        gap = (output - layer(x)).abs()
    assert relative_error(output, expected) < 1e-5
    assert (gap <= bound + 1e-5).all()
    assert gap.max() > 0


@needs_exact
def test_dynamic_products_do_not_overflow() -> None:
    layer = nn.Linear(3072, 8, bias=False)
    nn.init.ones_(layer.weight)
    for sign in (1.0, -1.0):
        output = logits(quantized(layer, "int8_dynamic"), torch.full((2, 3072), sign))
        assert relative_error(output, torch.full((2, 8), 3072 * sign)) < 0.01


@pytest.mark.parametrize("scheme", EVALUATED)
def test_a_vit_answers_nearly_as_before(scheme: str) -> None:
    net, x = vit(), images(dtype=torch.float32, batch=64)
    before, after = logits(net, x), logits(quantized(net, scheme), x)
    assert (before.argmax(-1) == after.argmax(-1)).float().mean() >= 0.95
    assert relative_error(after, before) < 0.05
    assert not torch.equal(before, after)


@pytest.mark.parametrize("scheme", EVALUATED)
def test_a_cut_net_answers_nearly_as_before(scheme: str) -> None:
    net, x = cut(small_net(dtype=torch.float32), CUT), images(dtype=torch.float32, batch=64)
    kinds = {type(module) for module in net.modules()}
    assert {GatheredLinear, SlicedAttention} <= kinds
    single = [n for n, m in net.named_modules() if type(m) is nn.Linear and m.in_features == 1]
    assert {name.endswith(".linear") for name in single} == {True, False}, "gathered or not"
    before, after = logits(net, x), logits(quantized(net, scheme), x)
    assert (before.argmax(-1) == after.argmax(-1)).float().mean() >= 0.95
    assert relative_error(after, before) < 0.05


@pytest.mark.parametrize("scheme", EVALUATED)
@pytest.mark.parametrize("rank", [1, 7])
def test_low_rank_layers_answer_nearly_as_before(scheme: str, rank: int) -> None:
    layers = ("blocks.0.attn.qkv.q", "blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.mlp.fc2")
    edits = tuple(LowRank(linear=layer, rank=rank) for layer in layers)
    net = cut(small_net(dtype=torch.float32), Plan(model=MODEL, edits=edits))
    x = images(dtype=torch.float32, batch=64)
    assert relative_error(logits(quantized(net, scheme), x), logits(net, x)) < 0.05


@pytest.mark.parametrize("scheme", EVALUATED)
def test_mixed_precision_evaluates_too(scheme: str) -> None:
    net, x = vit(), images(dtype=torch.float32, batch=16)
    with torch.autocast("cpu", torch.bfloat16):
        after = logits(quantized(net, scheme), x)
    assert relative_error(after.float(), logits(net, x)) < 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("plan", [plan_of({}), CUT], ids=["dense", "cut"])
def test_every_linear_is_quantised_and_nothing_else(scheme: str, plan: Plan) -> None:
    net = quantized(cut(small_net(dtype=torch.float32), plan), scheme)
    linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 2 * 4 + 1
    inside = {id(layer.weight) for layer in linears}
    for parameter in net.parameters():
        assert (type(parameter.data).__name__ == "Int8Tensor") == (id(parameter) in inside)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_input_is_left_alone(scheme: str) -> None:
    net = cut(small_net(dtype=torch.float32), CUT)
    kept = {name: (id(p), p.clone()) for name, p in net.named_parameters()}
    state, rng = [*net.modules()], torch.get_rng_state()
    int8 = quantized(net, scheme)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [*net.modules()] == state
    for name, parameter in net.named_parameters():
        assert id(parameter) == kept[name][0]
        assert torch.equal(parameter, kept[name][1])
    shared = {p.data_ptr() for p in net.parameters()}
    for tensor in chain(int8.parameters(), int8.buffers()):
        assert type(tensor.data).__name__ == "Int8Tensor" or tensor.data_ptr() not in shared


def test_megabytes_are_the_bytes_held() -> None:
    layer = linear(300, 100)
    assert megabytes(layer) == 4 * (300 * 100 + 100) / 1e6
    for scheme in SCHEMES:  # integers, a scale, a zero point, the bias in float
        assert megabytes(quantized(layer, scheme)) == (300 * 100 + 100 * (4 + 1 + 4)) / 1e6
    net = vit()
    weights = sum(m.weight.nbytes for m in net.modules() if isinstance(m, nn.Linear)) / 1e6
    for scheme in SCHEMES:
        linears = megabytes(quantized(net, scheme)) - (megabytes(net) - weights)
        assert 0.25 * weights < linears < 0.29 * weights


@needs_exact
def test_every_scheme_has_accuracy_and_megabytes() -> None:
    net, seen = vit(), []

    def evaluate(int8: nn.Module) -> dict[str, float]:
        seen.append(int8)
        return {"top1": 50.0, "top5": 90.0}

    evaluated = evaluate_schemes(net, SCHEMES, evaluate)
    assert evaluated["float_mb"] == megabytes(net)
    assert [*evaluated["quantized"]] == [*SCHEMES]
    for int8, row in zip(seen, evaluated["quantized"].values(), strict=True):
        assert row == {"top1": 50.0, "top5": 90.0, "mb": megabytes(int8)}
    blind = evaluate_schemes(net, SCHEMES[:1], None)["quantized"]["int8_weight_only"]
    assert blind == {"top1": None, "top5": None, "mb": megabytes(seen[0])}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("quantize=[int4]", ["quantize=[int4]", "int8_weight_only", "int8_dynamic"]),
        ("quantize=int8_dynamic", ["quantize=int8_dynamic", "list", "[int8_weight_only"]),
        ("quantize=null", ["quantize=None", "list"]),
        ("quantize=[[]]", ["quantize=[[]]", "list"]),
        ("quantize=[int8_weight_only,int8_weight_only]", ["quantize=", "at most once"]),
    ],
)
def test_bad_schemes_are_refused_before_the_run(
    command: Command, argument: str, expected: list[str]
) -> None:
    assert_refused(command, *TINY, argument, expected=expected)


def test_an_unknown_scheme_lists_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match=r"scheme=int4: .*int8_weight_only, int8_dynamic"):
        quantized(vit(), "int4")


def test_without_torchao_the_run_does_not_start(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    words = ["quantize=[int8_weight_only]", "pip install torchao"]
    assert_refused(command, *TINY, "quantize=[int8_weight_only]", expected=words)
    with pytest.raises(ConfigError, match="pip install torchao"):
        quantized(vit(), "int8_weight_only")


def test_a_processor_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrim.deploy.quantize.is_exact", lambda: False)
    check(["int8_weight_only"], accelerator="cpu")
    with pytest.raises(ConfigError, match=r"quantize=\[int8_dynamic\].*VNNI"):
        check(["int8_dynamic"], accelerator="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check(["int8_dynamic"], accelerator="gpu")


def test_importing_torchao_says_nothing_and_leaves_the_loggers() -> None:
    code = (
        "import logging; from torch import nn; from vitrim.deploy.quantize import quantized; "
        "quantized(nn.Linear(3, 2), 'int8_dynamic'); "
        "assert not logging.getLogger('torchao').level"
    )
    words = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_exact
def test_a_run_reports_the_quantised_net_and_the_compact_one(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    schemes = f"quantize=[{','.join(SCHEMES)}]"
    done = command(*TINY, "strength=3", schemes)
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    net, _ = load(done.report.parent)
    assert report["float_mb"] == megabytes(net)
    assert [*report["quantized"]] == sorted(SCHEMES)
    for scheme, row in report["quantized"].items():
        assert row["mb"] == megabytes(quantized(net, scheme)) < 0.4 * report["float_mb"]
        assert abs(row["top1"] - report["compact"]["top1"]) < 5
        assert 0 <= row["top1"] <= row["top5"] <= 100
    assert "torchao" in report["versions"]
    capsys.readouterr()
    main([str(command.out), "--wandb", "disabled"])
    printed = capsys.readouterr().out.splitlines()
    assert "vit_digits on digits in int8" in printed
    rows = [line for line in printed if "int8_dynamic" in line or "int8_weight_only" in line]
    assert len(rows) == 2
    assert max(map(len, rows)) <= 120
    text = (command.out / "report" / "report.md").read_text()
    assert "## In int8" in text
    assert text.count("| int8_") == 2


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

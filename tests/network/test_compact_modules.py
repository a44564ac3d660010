"""The modules of compact networks behave as timm's and PyTorch's do, for other tools."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from compacts import NETS, compact, dense, plan, x
from nets import MODEL, TINY, images, relative_error
from vitrim import LowRank, Plan, cut, load, save
from vitrim.errors import ConfigError
from vitrim.files import WEIGHTS
from vitrim.network.attention import GatheredLinear
from vitrim.network.head_runs import ARRANGEMENTS, SlicedHeads, arrange_heads, sliced_attentions

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`torch.jit.script` is deprecated",
        "`torch.jit.script_method` is deprecated",
        "torch.searchsorted",
        "Using a non-tuple sequence",
    )
]
FAST = ("vit", "swin", "beit", "dinov3")
each = pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in NETS]
)
attentive = pytest.mark.parametrize(
    "family", [f for f in ("vit", "swin", "beit", "eva-02, GluMlp", "swin v2") if f in NETS]
)


def check_translated(family: str, translate: Callable[[nn.Module], nn.Module]) -> None:
    checked = 0
    for fused in (True, False):
        try:
            translate(with_kernel(copy.deepcopy(dense(family)), fused=fused))
        except Exception:  # the dense network cannot be translated either
            continue
        net = with_kernel(cut(dense(family), plan(family)), fused=fused)
        with torch.no_grad():
            assert relative_error(translate(net)(x(family)), net(x(family))) < 1e-6
        checked += 1
    if not checked:
        pytest.skip("the dense network cannot be translated either")
    assert family not in ("vit", "swin", "beit") or checked == 2


def with_kernel(net: nn.Module, *, fused: bool) -> nn.Module:
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return net


@each
def test_compact_networks_are_scripted_where_dense_ones_are(family: str) -> None:
    check_translated(family, torch.jit.script)


@each
def test_compact_networks_are_traced_where_dense_ones_are(family: str) -> None:
    check_translated(family, torch.fx.symbolic_trace)


@attentive
def test_heads_compute_the_same_however_they_are_run(family: str) -> None:
    net, state = copy.deepcopy(compact(family)), compact(family).state_dict()
    attentions = sliced_attentions(net).values()
    with torch.no_grad():
        expected = compact(family)(x(family))
        for arrangement in ("fused", "padded"):
            assert relative_error(arrange_heads(net, arrangement)(x(family)), expected) < 1e-6
            assert net.state_dict().keys() == state.keys()
            assert all(len(a.head_runs) == 1 for a in attentions if arrangement == "padded")
        assert max(len(a.head_runs) for a in arrange_heads_of(net)) > 1
        assert torch.equal(net(x(family)), expected)


def arrange_heads_of(net: nn.Module) -> list[SlicedHeads]:
    return [*sliced_attentions(arrange_heads(net, "runs")).values()]


@pytest.mark.parametrize(
    "family", ["vit", *(pytest.param(f, marks=pytest.mark.slow) for f in ("swin", "beit"))]
)
def test_arranged_heads_are_scripted_and_traced(family: str) -> None:
    for translate in (torch.jit.script, torch.fx.symbolic_trace):
        for how in ARRANGEMENTS[1:]:
            check_translated(family, lambda net, f=translate, how=how: f(arrange_heads(net, how)))


def test_an_unknown_arrangement_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of runs, fused, padded"):
        arrange_heads(compact("vit"), "sorted")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_fast_families_are_translated(family: str) -> None:
    torch.jit.script(dense(family))
    torch.fx.symbolic_trace(dense(family))


@each
def test_every_linear_reads_as_many_columns_as_it_says(family: str) -> None:
    net = compact(family)
    seen = []

    def check(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert args[0].shape[-1] == module.in_features
        seen.append(module)

    for module in net.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        if isinstance(module, nn.Linear | GatheredLinear):
            module.register_forward_pre_hook(check)
    with torch.no_grad():
        net(x(family))
    assert seen
    assert family not in FAST or any(isinstance(module, GatheredLinear) for module in seen)


class Adapter(nn.Module):
    """LoRA, as its libraries add it to every Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + self.b(self.a(input))


def test_adapters_fit_on_every_linear() -> None:
    net = cut(dense("vit"), plan("vit"))
    with torch.no_grad():
        before = net(x("vit"))
    linears = [name for name, module in net.named_modules() if type(module) is nn.Linear]
    assert any("qkv" in name for name in linears)
    for name in linears:
        net.set_submodule(name, Adapter(net.get_submodule(name)))
    after = net(x("vit"))
    assert torch.equal(before, after.detach())
    after.square().sum().backward()
    assert all(m.b.weight.grad is not None for m in net.modules() if isinstance(m, Adapter))


def test_names_in_files_are_those_of_the_dense_network(tmp_path: Path) -> None:
    sliced = Plan(
        model={"name": MODEL["name"], "args": TINY | {"depth": 4}},
        edits=tuple(e for e in plan("vit").edits if not isinstance(e, LowRank)),
    )
    small = cut(dense("vit"), sliced)
    folder = save(tmp_path, small, sliced)
    names = safetensors.torch.load_file(folder / WEIGHTS).keys()
    assert names <= dense("vit").state_dict().keys()
    assert names == load(folder)[0].state_dict().keys()
    twin = cut(dense("vit"), sliced)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert not [*twin.load_state_dict(small.state_dict())[0]]
    assert torch.equal(twin(x("vit")), small(x("vit")))
    with pytest.raises(RuntimeError, match="size mismatch"):
        twin.load_state_dict(dense("vit").state_dict(), strict=False)


@attentive
def test_the_input_size_of_compact_networks_can_be_set(family: str) -> None:
    sliced = Plan(
        model={}, edits=tuple(e for e in plan(family).edits if not isinstance(e, LowRank))
    )
    side = 2 * int(NETS[family][1]["img_size"])
    small, wide = cut(dense(family), sliced), cut(dense(family), Plan(model={}, edits=()))
    small.set_input_size(img_size=(side, side))
    wide.set_input_size(img_size=(side, side))
    larger = images(side, dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(small(larger), cut(wide, sliced)(larger)) < 1e-5


@attentive
def test_attention_maps_are_what_the_dropout_module_reads(family: str) -> None:
    net = with_kernel(cut(dense(family), plan(family)), fused=False).eval()
    maps: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if name.endswith("attn_drop"):
            module.register_forward_hook(lambda _, args, out, name=name: maps.update({name: out}))
    with torch.no_grad():
        net(x(family))
    assert maps.keys() == {name for name, _ in net.named_modules() if name.endswith("attn_drop")}
    assert all(torch.allclose(part.sum(-1), torch.ones(())) for part in maps.values())

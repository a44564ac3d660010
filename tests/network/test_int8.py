"""Int8 layers in plans: cutting, masking, counting, saving, combining."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from families import FAMILIES, SWIN
from loading import logits_elsewhere
from nets import (
    MODEL,
    PLANS,
    SIZE,
    images,
    outputs,
    plan_of,
    randomise,
    relative_error,
    small_net,
)
from vitrim import Drop, Int8, Keep, LowRank, Plan, combine, count, cut, load, masked, save
from vitrim.budget.cost import Cost
from vitrim.files import WEIGHTS
from vitrim.network import sites, structure
from vitrim.network.int8 import int8_edits, linears_of
from vitrim.network.int8_linear import Int8Linear, integer_product, rounded
from vitrim.network.structure import factorisable_rows
from vitrim.plan import Edit, PlanError

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (name, args) for family, (name, args, _) in FAMILIES.items()},
    "vit": (MODEL["name"], MODEL["args"]),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "resnet": ("resnet18", {"num_classes": 7}),
    "mobilenet": ("mobilenetv2_050", {"num_classes": 7}),
}
CHECKED = ("vit", "swin", "convnext", "beit", "eva-02, q, k and v apart", "levit")
"""Networks whose int8 twins are compared; levit has BatchNorms, beit reads weights by name."""
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@cache
def net_of(family: str) -> nn.Module:
    name, args = NETWORKS[family]
    return randomise(timm.create_model(name, pretrained=False, **args).double())


def side_of(family: str) -> int:
    return int(NETWORKS[family][1].get("img_size", 64))


def half(family: str, *, dynamic: bool = False) -> Plan:
    """Keep half of the units of every site, and make every Linear int8."""
    net = net_of(family)
    keeps = {
        name: sorted({0, *range(site.size // 2, site.size)}) for name, site in sites(net).items()
    }
    edits = (*plan_of(keeps).edits, *int8_edits(net, structure(net), dynamic=dynamic))
    return Plan(model={}, edits=edits)


def size_of(net: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in net.state_dict().values())


@st.composite
def int8_plans(draw: st.DrawFn) -> Plan:
    """Draw slices of the small ViT, ranks of layers or pieces, and int8 layers."""
    edits: list[Edit] = [*draw(PLANS).edits]
    for block in range(2):
        for path in LINEARS:
            name = f"blocks.{block}.{path}"
            pieces = [f"{name}.{piece}" for piece in "qkv"] if path == "attn.qkv" else []
            for layer in draw(st.sampled_from([[], [name], pieces])):
                edits.append(LowRank(linear=layer, rank=draw(st.integers(1, 8))))
            if draw(st.booleans()):
                edits.append(Int8(linear=name))
    if draw(st.booleans()):
        edits.append(Int8(linear="head"))
    return Plan(model=MODEL, edits=tuple(edits))


@given(int8_plans())
def test_cut_equals_masked_and_the_formula_gives_its_size(plan: Plan) -> None:
    net, x = net_of("vit"), images()
    compact, plain = cut(net, plan), cut(net, plan.in_float())
    assert relative_error(outputs(compact, x), outputs(masked(net, plan), x)) <= 1e-12
    amount = Cost(net, SIZE).plan(plan)
    assert amount[:2] == count(compact, SIZE)[:2] == count(plain, SIZE)[:2]
    assert amount.size_bytes == size_of(compact)
    assert sum(isinstance(m, Int8Linear) for m in compact.modules()) >= len([*plan.int8s()])


@pytest.mark.parametrize("family", [name for name in CHECKED if name in NETWORKS])
def test_cut_equals_masked_in_every_family(family: str) -> None:
    net, plan = net_of(family), half(family)
    x = images(side_of(family))
    assert relative_error(outputs(cut(net, plan), x), outputs(masked(net, plan), x)) <= 1e-12


@pytest.mark.parametrize("family", NETWORKS)
def test_the_formula_gives_the_bytes_of_every_family(family: str) -> None:
    net, plan = net_of(family), half(family)
    cost = Cost(net, side_of(family))
    assert cost.plan(Plan(model={}, edits=())).size_bytes == size_of(net)
    for edits in (plan, plan.in_float()):
        assert cost.plan(edits).size_bytes == size_of(cut(net, edits))
    branches = structure(net).branches
    for branch in branches[:2]:
        dropped = Plan(model={}, edits=(Drop(branch=branch.name),))
        assert cost.plan(dropped).size_bytes == size_of(cut(net, dropped))
    once = cut(net, plan.in_float())
    again = Plan(model={}, edits=int8_edits(once, structure(once), dynamic=False))
    assert Cost(once, side_of(family)).plan(again).size_bytes == size_of(cut(once, again))


def test_layers_in_factors_can_become_int8_later() -> None:
    net = net_of("vit")
    ranks = [LowRank(linear=f"blocks.0.{path}", rank=3) for path in ("attn.qkv.k", "mlp.fc1")]
    once = cut(net, Plan(model=MODEL, edits=tuple(ranks)))
    edits = int8_edits(once, structure(once), dynamic=False)
    assert [edit.linear for edit in edits] == [*linears_of(net)]
    later = cut(once, Plan(model=MODEL, edits=edits))
    together = combine(net, Plan(model=MODEL, edits=tuple(ranks)), Plan(model=MODEL, edits=edits))
    assert torch.equal(outputs(later, images()), outputs(cut(net, together), images()))
    assert Cost(once, SIZE).plan(Plan(model=MODEL, edits=edits)).size_bytes == size_of(later)


@settings(max_examples=5)
@given(int8_plans())
def test_a_saved_network_comes_back_bit_equal(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan
) -> None:
    net = cut(small_net(dtype=torch.float32), plan)
    folder = save(tmp_path_factory.mktemp("net"), net, plan)
    loaded, read = load(folder)
    assert read == plan
    assert torch.equal(outputs(loaded, x32()), outputs(net, x32()))
    stored = load_file(folder / WEIGHTS)
    assert sum(tensor.nbytes for tensor in stored.values()) == size_of(net)
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.int8} == {
        name for name in stored if name.endswith("weight_int8")
    }


def x32() -> Tensor:
    return images(dtype=torch.float32)


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    net = small_net(dtype=torch.float32)
    keeps = plan_of({"blocks.0.attn.input": (0, 3), "blocks.1.mlp.hidden": range(11)}).edits
    ranks = (LowRank(linear="blocks.1.attn.qkv.v", rank=2),)
    int8 = [Int8(linear=name, dynamic=index % 2 == 0) for index, name in enumerate(linears_of(net))]
    plan = Plan(model=MODEL, edits=(*keeps, *ranks, *int8))
    compact = cut(net, plan)
    logits = logits_elsewhere(save(tmp_path / "net", compact, plan), x32(), tmp_path)
    with torch.no_grad():
        assert torch.equal(logits, compact(x32()))


def test_weights_are_rounded_to_the_nearest_of_255_values_of_their_row() -> None:
    weight = torch.tensor([[1.27, -0.634, 0.006, 0.004], [0.0, 0.0, 0.0, 0.0]])
    integers, scale = rounded(weight)
    assert integers.tolist() == [[127, -63, 1, 0], [0, 0, 0, 0]]
    assert torch.allclose(scale, torch.tensor([[0.01], [1.0]]))


@pytest.mark.parametrize("columns", [1, 1040, 1041, 3072])
def test_integer_products_are_exact(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(low, 128, (5, columns), generator=generator) for low in (-127, 100))
    product = integer_product(x.float(), weight.to(torch.int8), torch.float32)
    assert torch.equal(product, (x @ weight.T).float())


@pytest.mark.parametrize("family", ["vit", "swin", "beit"])
def test_dynamic_int8_is_the_product_of_rounded_inputs(family: str) -> None:
    net, plan = net_of(family), half(family, dynamic=True)
    compact, twin = cut(net, plan), cut(net, Plan(model={}, edits=tuple(plan.in_float().edits)))
    linears, by_call = linears_of(twin), 0
    for edit in plan.int8s():
        layer = linears[edit.linear]
        inner = layer if isinstance(layer, nn.Linear) else layer.get_submodule("linear")
        integers, scale = rounded(inner.weight.detach().float())  # type: ignore[operator]
        inner.weight.data = integers.double() * scale.double()
        if edit.dynamic:
            by_call += 1
            inner.register_forward_pre_hook(lambda module, args: (round_trip(args[0]),))
    assert by_call >= len(linears) - 2
    x = images(side_of(family))
    assert relative_error(outputs(compact, x), outputs(twin, x)) <= 1e-6
    with pytest.raises(PlanError, match="int8 inputs cannot be masked"):
        masked(net, plan)


def round_trip(x: Tensor) -> Tensor:
    integers, scale = rounded(x)
    return integers * scale


def test_what_cannot_be_int8_is_refused() -> None:
    vit, beit = net_of("vit"), net_of("beit")
    for net, edits, message in (
        (vit, (Int8(linear="patch_embed.proj"),), "unknown linear 'patch_embed.proj'.*attn.proj"),
        (vit, (Int8(linear="blocks.0.attn.qkv.q"),), "unknown linear"),
        (beit, (Int8(linear="blocks.0.attn.qkv", dynamic=True),), "without calling it"),
        (
            vit,
            (Drop(branch="blocks.0.mlp"), Int8(linear="blocks.0.mlp.fc1")),
            "its branch is dropped",
        ),
    ):
        with pytest.raises(PlanError, match=message):
            cut(net, Plan(model=MODEL, edits=edits))
    once = cut(vit, Plan(model=MODEL, edits=(Int8(linear="head"),)))
    for edit in (Int8(linear="head"), Keep(site="blocks.0.mlp.hidden", index=(0,))):
        with pytest.raises(PlanError, match="int8"):
            cut(once, Plan(model=MODEL, edits=(edit,)))
    with pytest.raises(PlanError, match="plan for the float network"):
        Cost(once, SIZE)
    copied = cut(once, Plan(model={}, edits=()))
    assert torch.equal(outputs(copied, images()), outputs(once, images()))


def test_every_linear_of_the_structure_can_be_int8() -> None:
    net = net_of("vit")
    known = {name for layer in structure(net).layers for name in factorisable_rows(layer)}
    assert {name for name in known if not name.endswith((".q", ".k", ".v"))} < {*linears_of(net)}
    assert {*linears_of(net)} - known == {"head"}

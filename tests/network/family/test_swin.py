"""Swin: cuts of windowed attention, position bias tables and dropped branches, and its stream."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from timm.layers import set_fused_attn
from torch import Tensor, nn

from loading import logits_elsewhere
from nets import images, outputs, plan_of, plans, randomise, relative_error, silenced
from vitrim import Drop, LowRank, Plan, combine, count, cut, load, masked, save
from vitrim.budget.cost import Cost
from vitrim.errors import ConfigError
from vitrim.method.mixed_rank.profile import Piece, Profile
from vitrim.method.mixed_rank.regress import Regress
from vitrim.model.source import Timm
from vitrim.network import UnsupportedArchitecture, branches, sites, stream, structure
from vitrim.network.attention import SlicedWindowAttention
from vitrim.network.skeleton import on_meta
from vitrim.network.structure import members
from vitrim.plan import dumps, loads
from vitrim.trainer.activations import capture
from vitrim.trainer.calibrate import Calibrate, Sampling
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.refit import Refit

NAME = "swin_tiny_patch4_window7_224"
SIZE = 40
SMALL: dict[str, Any] = {
    "img_size": SIZE,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 3),
    "mlp_ratio": 2.0,
    "num_classes": 7,
}
"""Maps of 10x10 and 5x5 tokens, both padded to full windows of 4x4, half of them shifted."""
MODEL = {"name": NAME, "args": {**SMALL, "depths": [2, 2], "num_heads": [2, 3]}}
KINDS = ("attn.input", "attn.heads", "attn.qk", "attn.v", "mlp.input", "mlp.hidden")
BLOCKS = [f"layers.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)]
BRANCHES = tuple(f"{block}.{kind}" for block in BLOCKS for kind in ("attn", "mlp"))
EVERYTHING = plan_of(
    {
        "layers.0.blocks.0.attn.heads": (1,),
        "layers.0.blocks.0.attn.input": (0, 5, 11),
        "layers.0.blocks.1.attn.qk": (0, 1, 2, 7),
        "layers.0.blocks.1.attn.v": (0, 6, 7),
        "layers.0.blocks.1.mlp.input": (7,),
        "layers.1.blocks.0.attn.qk": (8, 9),
        "layers.1.blocks.1.attn.heads": (0, 2),
        "layers.1.blocks.1.attn.v": (0, 1, 9, 16),
        "layers.1.blocks.1.mlp.hidden": (0, 47),
    },
    MODEL,
)
"""Heads removed, of unequal widths, and without query-key dims; windows shifted and not."""
DROPS = Plan(
    model=MODEL,
    edits=tuple(Drop(branch=BRANCHES[index]) for index in (0, 3, 5, 6, 7)),
)
"""A block without attention, one without MLP, one without either; in both stages."""


def swin(*, dtype: torch.dtype = torch.float64, **args: Any) -> nn.Module:
    """Return a random network in eval mode; `args` change those of SMALL."""
    return randomise(timm.create_model(NAME, pretrained=False, **{**SMALL, **args}).to(dtype))


@cache
def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    return swin(dtype=dtype)


@cache
def cost() -> Cost:
    return Cost(net(), SIZE)


PLANS = plans(sites(net()), MODEL)
NO_EDITS = Plan(model=MODEL, edits=())


def attentions(module: nn.Module) -> Iterator[SlicedWindowAttention]:
    return (part for part in module.modules() if isinstance(part, SlicedWindowAttention))


def fuse(module: nn.Module, *, fused: bool) -> nn.Module:
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    return module


@st.composite
def edited(draw: st.DrawFn, dense: nn.Module) -> Plan:
    """Draw a plan that slices, drops and factorises."""
    dropped = draw(st.sets(st.sampled_from(branches(dense)), max_size=3))
    inside = members(structure(dense), dropped)
    keeps = [keep for keep in draw(PLANS).keeps() if keep.site not in inside]
    ranks = {}
    for layer in structure(dense).layers:
        if layer.name not in inside and draw(st.booleans()):
            names = [f"{layer.name}.{piece}" for piece in layer.pieces if draw(st.booleans())]
            ranks |= dict.fromkeys(names or [layer.name], draw(st.integers(1, 12)))
    drops = [Drop(branch=name) for name in sorted(dropped)]
    low = [LowRank(linear=name, rank=rank) for name, rank in ranks.items()]
    return Plan(model=MODEL, edits=(*drops, *keeps, *low))


@given(PLANS)
def test_cut_equals_masked_and_silenced_activations(plan: Plan) -> None:
    x = images(SIZE)
    small = cut(net(), plan)
    actual = outputs(small, x)
    assert relative_error(actual, outputs(masked(net(), plan), x)) <= 1e-12
    assert relative_error(actual, outputs(silenced(net(), plan), x)) <= 1e-12
    assert cost().plan(plan)[:2] == count(small, SIZE)[:2]


@given(edited(net()))
def test_slices_drops_and_low_ranks_go_together(plan: Plan) -> None:
    x, small = images(SIZE), cut(net(), plan)
    assert relative_error(outputs(small, x), outputs(masked(net(), plan), x)) <= 1e-12
    assert cost().plan(plan)[:2] == count(small, SIZE)[:2]
    assert Cost(small, SIZE).plan(NO_EDITS)[:2] == count(small, SIZE)[:2]
    assert loads(dumps(plan)) == plan


@given(first=PLANS, data=st.data())
def test_two_cuts_equal_one_by_the_composed_plan(first: Plan, data: st.DataObject) -> None:
    once = cut(net(), first)
    second = data.draw(plans(sites(once), MODEL))
    twice, combined = cut(once, second), cut(net(), combine(net(), first, second))
    assert (
        relative_error(outputs(twice, images(SIZE)), outputs(masked(once, second), images(SIZE)))
        <= 1e-12
    )
    assert {n: t.shape for n, t in twice.state_dict().items()} == {
        n: t.shape for n, t in combined.state_dict().items()
    }
    assert torch.equal(outputs(twice, images(SIZE)), outputs(combined, images(SIZE)))


@given(first=PLANS)
def test_drops_compose_with_slices(first: Plan) -> None:
    removed = members(structure(net()), {drop.branch for drop in DROPS.drops()})
    keeps = tuple(keep for keep in first.keeps() if keep.site not in removed)
    for one, other in ((first, DROPS), (DROPS, Plan(model=MODEL, edits=keeps))):
        twice = cut(cut(net(), one), other)
        once = cut(net(), combine(net(), one, other))
        assert torch.equal(outputs(once, images(SIZE)), outputs(twice, images(SIZE)))


def half(dense: nn.Module) -> Plan:
    """Keep a random half of every site."""
    generator = torch.Generator().manual_seed(3)
    kept = {
        name: sorted(
            torch.randperm(site.size, generator=generator)[: (site.size + 1) // 2].tolist()
        )
        for name, site in sites(dense).items()
    }
    return plan_of(kept)


from_1_0_20 = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.20"), reason="timm 1.0.19 cannot yet"
)
MADE = {
    "whole windows": {"img_size": 32},
    "maps smaller than a window": {"img_size": 24},
    "two sides": {"img_size": (32, 48)},
    "windows of two sides": {"img_size": 48, "window_size": (3, 4)},
    "always in windows": {"img_size": 24, "always_partition": True},
    "no biases": {"qkv_bias": False},
    "heads of one width": {"head_dim": 5},
    "masks made on the way": {"dynamic_img_size": True},
}


@pytest.mark.parametrize(
    "args",
    [
        *(pytest.param(args, id=name) for name, args in MADE.items()),
        pytest.param({"window_size": ((4, 4), (2, 2))}, id="windows by stage", marks=from_1_0_20),
    ],
)
def test_half_of_every_site_is_cut_and_counted_exactly(args: dict[str, Any]) -> None:
    dense = swin(**args)
    height, width = dense.patch_embed.img_size
    plan, x = half(dense), images(max(height, width))[:, :, :height, :width]
    small = cut(dense, plan)
    actual = outputs(small, x)
    for oracle in (masked, silenced):
        assert relative_error(actual, outputs(oracle(dense, plan), x)) <= 1e-12
    assert relative_error(actual, outputs(dense, x)) > 1e-3
    assert Cost(dense, (height, width)).plan(plan)[:2] == count(small, (height, width))[:2]


@from_1_0_20
def test_a_network_for_any_size_is_cut_for_any_size() -> None:
    dense = swin(dynamic_img_size=True)
    x, small = images(56), cut(dense, half(dense))
    assert relative_error(outputs(small, x), outputs(masked(dense, half(dense)), x)) <= 1e-12


def test_every_block_has_its_sites_and_branches_in_order() -> None:
    assert list(sites(net())) == [f"{block}.{kind}" for block in BLOCKS for kind in KINDS]
    assert branches(net()) == BRANCHES
    sizes = [site.size for site in sites(net()).values()]
    assert sizes == 2 * [12, 2, 12, 12, 12, 24] + 2 * [24, 3, 24, 24, 24, 48]
    assert sites(net())["layers.1.blocks.0.attn.v"].head_dims == (8, 8, 8)


def test_tables_lose_the_columns_of_removed_heads() -> None:
    small = cut(net(), EVERYTHING)
    widths = [(part.qk_dims, part.v_dims) for part in attentions(small)]
    assert widths == [((6,), (6,)), ((3, 1), (1, 2)), ((0, 2, 0), (8, 8, 8)), ((8, 8), (2, 1))]
    for block, heads in zip(BLOCKS, ([1], [0, 1], [0, 1, 2], [0, 2]), strict=True):
        name = f"{block}.attn.relative_position_bias_table"
        assert torch.equal(small.get_parameter(name), net().get_parameter(name)[:, heads])
        zero = masked(net(), EVERYTHING).get_parameter(name).T.any(dim=1)
        assert zero.nonzero().flatten().tolist() == heads
    assert all(tensor.is_contiguous() for tensor in small.state_dict().values())


@given(PLANS)
def test_masked_leaves_as_many_numbers_as_cut(plan: Plan) -> None:
    twin, small = masked(net(), plan), cut(net(), plan)
    assert sum(int(p.count_nonzero()) for p in twin.parameters()) == sum(
        p.numel() for p in small.parameters()
    )


def test_nothing_removed_is_bit_identical_and_nothing_is_shared() -> None:
    everything_kept = plan_of({name: range(site.size) for name, site in sites(net()).items()})
    before = {name: tensor.clone() for name, tensor in net().named_parameters()}
    logits = outputs(net(), images(SIZE))
    for plan in (NO_EDITS, everything_kept, EVERYTHING, DROPS):
        for make in (cut, masked):
            twin = make(net(), plan)
            if plan in (NO_EDITS, everything_kept):
                assert torch.equal(outputs(twin, images(SIZE)), logits)
            with torch.no_grad():
                for tensor in (*twin.parameters(), *twin.buffers()):
                    tensor.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in net().named_parameters())
    assert torch.equal(outputs(net(), images(SIZE)), logits)


@pytest.mark.parametrize("plan", [EVERYTHING, DROPS], ids=["sliced", "dropped"])
@pytest.mark.parametrize("fused", [False, True])
def test_every_parameter_gets_a_gradient_by_either_kernel(plan: Plan, fused: bool) -> None:
    small = fuse(cut(net(), plan), fused=fused)
    small(images(SIZE)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in small.parameters())


@given(PLANS)
def test_fused_and_plain_attention_agree(plan: Plan) -> None:
    plain, fast = (fuse(cut(net(), plan), fused=fused) for fused in (False, True))
    assert relative_error(outputs(fast, images(SIZE)), outputs(plain, images(SIZE))) <= 1e-12


def test_the_kernel_chosen_at_construction_survives_the_cut() -> None:
    for fused in (False, True):
        set_fused_attn(True, experimental=fused)
        try:
            small = cut(swin(), EVERYTHING)
        finally:
            set_fused_attn(True)
        assert {part.fused_attn for part in attentions(small)} == {fused}


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_the_new_width_would_be_wrong(fused: bool) -> None:
    narrow = plan_of({f"{block}.attn.qk": range(0, 12, 2) for block in BLOCKS[:2]})
    small, x = fuse(cut(net(), narrow), fused=fused), images(SIZE)
    expected = outputs(masked(net(), narrow), x)
    assert relative_error(outputs(small, x), expected) <= 1e-12
    for part in attentions(small):
        assert part.qk_dims == (3, 3)
        part.scale = 3**-0.5
    assert relative_error(outputs(small, x), expected) > 1e-3


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("plan", [EVERYTHING, DROPS], ids=["sliced", "dropped"])
def test_every_module_stays_in_its_mode_and_training_moves_it(plan: Plan, training: bool) -> None:
    small = cut(swin().train(training), plan)
    assert {module.training for module in small.modules()} == {training}
    before = [parameter.clone() for parameter in small.parameters()]
    small(images(SIZE)).square().sum().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    pairs = zip(before, small.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)


@pytest.mark.parametrize("plan", [EVERYTHING, DROPS], ids=["sliced", "dropped"])
def test_the_meta_device_gives_the_same_shapes(plan: Plan) -> None:
    with on_meta():
        skeleton = timm.create_model(NAME, **SMALL)
    actual = {name: tensor.shape for name, tensor in cut(skeleton, plan).state_dict().items()}
    expected = {name: tensor.shape for name, tensor in cut(net(), plan).state_dict().items()}
    assert actual == expected


def test_nothing_of_a_dropped_branch_is_left() -> None:
    dense, kept = dict(net().named_parameters()), dict(cut(net(), DROPS).named_parameters())
    removed = [
        f"{block}.{part}."
        for block, _, kind in (drop.branch.rpartition(".") for drop in DROPS.drops())
        for part in (kind, "norm1" if kind == "attn" else "norm2")
    ]
    assert dense.keys() - kept == {name for name in dense if name.startswith(tuple(removed))}
    assert all(torch.equal(tensor, dense[name]) for name, tensor in kept.items())
    assert branches(cut(net(), DROPS)) == tuple(BRANCHES[block] for block in (1, 2, 4))


@given(st.permutations(BRANCHES), st.integers(0, 8))
def test_branches_drop_in_any_order(order: Sequence[str], n: int) -> None:
    small = net()
    for name in order[:n]:
        small = cut(small, Plan(model=MODEL, edits=(Drop(branch=name),)))
    plan = Plan(model=MODEL, edits=tuple(Drop(branch=name) for name in order[:n]))
    assert torch.equal(outputs(small, images(SIZE)), outputs(cut(net(), plan), images(SIZE)))
    expected = outputs(masked(net(), plan), images(SIZE))
    assert relative_error(outputs(small, images(SIZE)), expected) <= 1e-12


SAVED = {
    "dense": NO_EDITS,
    "sliced": EVERYTHING,
    "dropped": DROPS,
    "in factors": Plan(
        model=MODEL,
        edits=(
            *EVERYTHING.edits,
            LowRank(linear="layers.1.blocks.1.attn.qkv.q", rank=3),
            LowRank(linear="layers.0.blocks.0.mlp.fc1", rank=5),
        ),
    ),
}


@pytest.mark.parametrize("plan", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path, plan: Plan, dtype: torch.dtype) -> None:
    small = cut(net(dtype), plan)
    loaded, read = load(save(tmp_path, small, plan))
    assert read == plan
    actual, expected = dict(loaded.named_buffers()), dict(small.named_buffers())
    assert actual.keys() == expected.keys()
    assert all(
        torch.equal(actual[name], tensor) and actual[name].dtype == tensor.dtype
        for name, tensor in expected.items()
    )
    x = images(SIZE, dtype=dtype)
    assert torch.equal(outputs(loaded, x), outputs(small, x))


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    drops = [Drop(branch=BRANCHES[index]) for index in (4, 7)]
    keeps = [
        keep for keep in EVERYTHING.keeps() if not keep.site.startswith((BRANCHES[4], BRANCHES[7]))
    ]
    plan = Plan(model=MODEL, edits=(*drops, *keeps))
    small, x = cut(net(torch.float32), plan), images(SIZE, dtype=torch.float32)
    logits = logits_elsewhere(save(tmp_path / "net", small, plan), x, tmp_path)
    with torch.no_grad():
        assert torch.equal(logits, small(x))


def source(checkpoint: Path | str | None) -> Timm:
    return Timm(
        name=NAME,
        pretrained=False,
        checkpoint=None if checkpoint is None else str(checkpoint),
        sha256=None,
        num_classes=None,
        reset_head=False,
        image_size=MODEL["args"]["img_size"],
        mean=None,
        std=None,
        args={key: value for key, value in MODEL["args"].items() if key != "img_size"},
        training=Recipe(epochs=1, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0),
    )


def test_a_checkpoint_builds_the_network_that_it_was_made_of(tmp_path: Path) -> None:
    dense, x = net(torch.float32), images(SIZE, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "new.safetensors")
    for name, buffer in dense.named_buffers():  # older files of timm have them
        state[name] = buffer.clone()
    state["layers.0.downsample.norm.weight"] = state.pop("layers.1.downsample.norm.weight")
    state["layers.0.downsample.norm.bias"] = state.pop("layers.1.downsample.norm.bias")
    name = "downsample.reduction.weight"
    state[f"layers.0.{name}"] = state.pop(f"layers.1.{name}")
    state |= {f"head.{kind}": state.pop(f"head.fc.{kind}") for kind in ("weight", "bias")}
    safetensors.torch.save_file(state, tmp_path / "old.safetensors")
    for file in ("new", "old"):
        built = source(tmp_path / f"{file}.safetensors").build()
        assert torch.equal(outputs(built, x), outputs(dense, x))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depths": (2, 4)}, r"layers\.1\.blocks\.2\..* does not belong to this network"),
        ({"num_heads": (3, 3)}, "relative_position_bias_table has shape"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(
    tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    safetensors.torch.save_file(swin(**args).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=message):
        source(tmp_path / "other.safetensors").build()


def widths(plan: Plan, block: str, dim: int, n_heads: int) -> dict[str, int]:
    """Return the widths of a block after a plan of single sites."""
    full = {"input": dim, "heads": n_heads, "qk": dim, "v": dim, "in": dim, "hidden": 4 * dim}
    names = {"attn.input": "input", "mlp.input": "in", "mlp.hidden": "hidden"}
    for keep in plan.keeps():
        if keep.site.startswith(f"{block}."):
            kind = keep.site.removeprefix(f"{block}.")
            if kind == "attn.heads":
                per_head = dim // n_heads * len(keep.index)
                full |= {"heads": len(keep.index), "qk": per_head, "v": per_head}
            else:
                full[names[kind]] = len(keep.index)
    return full


def formula(
    size: int, dim: int, depths: Sequence[int], heads: Sequence[int], window: int, plan: Plan
) -> tuple[int, int]:
    """Count params and MACs of a Swin with patches of 4 and 1000 classes by hand."""
    side = size // 4
    params, macs = 48 * dim + 3 * dim, side * side * 48 * dim
    for stage, (depth, n_heads) in enumerate(zip(depths, heads, strict=True)):
        if stage:
            side = (side + 1) // 2
            params += 8 * dim + 4 * dim * 2 * dim
            macs += side * side * 4 * dim * 2 * dim
            dim *= 2
        wide = min(window, side)
        padded = (-(-side // wide) * wide) ** 2
        for block in range(depth):
            w = widths(plan, f"layers.{stage}.blocks.{block}", dim, n_heads)
            rows = 2 * w["qk"] + w["v"]
            attn, mlp = rows * w["input"] + w["v"] * dim, w["hidden"] * (w["in"] + dim)
            params += attn + rows + dim + (2 * wide - 1) ** 2 * w["heads"]
            params += mlp + w["hidden"] + dim + 4 * dim
            macs += padded * (attn + wide**2 * (w["qk"] + w["v"])) + side * side * mlp
    return params + 2 * dim + 1000 * dim + 1000, macs + 1000 * dim


SIZES = {
    "swin_tiny_patch4_window7_224": (96, (2, 2, 6, 2), (3, 6, 12, 24), 28_288_354, 4_490_566_656),
    "swin_base_patch4_window7_224": (
        128,
        (2, 2, 18, 2),
        (4, 8, 16, 32),
        87_768_224,
        15_430_946_816,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_hand_written_formula_gives_the_published_sizes(name: str) -> None:
    dim, depths, heads, params, macs = SIZES[name]
    with on_meta():
        dense = timm.create_model(name)
    assert formula(224, dim, depths, heads, 7, NO_EDITS) == (params, macs)
    cost = Cost(dense, 224)
    assert cost.plan(NO_EDITS)[:2] == count(dense, 224)[:2] == (params, macs)
    plan = plan_of(
        {
            "layers.0.blocks.1.attn.heads": (0, 2),
            "layers.1.blocks.0.attn.input": range(50),
            "layers.2.blocks.3.mlp.input": range(100),
            "layers.3.blocks.1.attn.heads": range(1, heads[3], 2),
            "layers.3.blocks.0.mlp.hidden": range(7),
        }
    )
    by_hand = formula(224, dim, depths, heads, 7, plan)
    assert cost.plan(plan)[:2] == count(cut(dense, plan), 224)[:2] == by_hand


def test_filled_up_windows_are_counted() -> None:
    with on_meta():
        dense = timm.create_model(NAME, img_size=256)
    by_hand = formula(256, 96, (2, 2, 6, 2), (3, 6, 12, 24), 7, NO_EDITS)
    assert Cost(dense, 256).plan(NO_EDITS)[:2] == count(dense, 256)[:2] == by_hand


def test_swins_of_other_blocks_are_refused() -> None:
    dense = swin()
    dense.layers[1].blocks[0] = nn.Linear(2, 2)
    with pytest.raises(UnsupportedArchitecture, match="SwinTransformer with Linear"):
        sites(dense)


@pytest.mark.parametrize("plan", [NO_EDITS, EVERYTHING, DROPS], ids=["dense", "sliced", "dropped"])
@pytest.mark.parametrize("args", [{}, {"img_size": 24}, {"img_size": (32, 48)}], ids=str)
def test_following_the_stream_is_running_the_network(args: dict[str, Any], plan: Plan) -> None:
    small = cut(swin(**args), plan)
    height, width = small.patch_embed.img_size
    images_ = images(max(height, width))[:, :, :height, :width]
    described = stream(small)
    inputs = [(step.reader, False) for step in described.steps]
    with torch.no_grad(), capture(small, [*inputs, (described.final_norm, False)]) as activations:
        features = small.forward_features(images_)
        x = described.embed(images_)
        for step in described.steps:
            assert torch.equal(activations[step.reader].flatten(1, -2), x.flatten(1, -2))
            x = step.advance(x)
            after = activations[described.reader_after(step)]
            assert relative_error(after.flatten(1, -2), x.flatten(1, -2)) <= 1e-12
        assert relative_error(small.norm(x), features) <= 1e-12


@pytest.mark.parametrize("args", [{}, {"img_size": 24}, {"img_size": (32, 48)}], ids=str)
def test_tokens_come_out_of_windows_in_the_streams_order(args: dict[str, Any]) -> None:
    dense = swin(**args)
    height, width = dense.patch_embed.img_size
    inside = [f"{b}.{'qkv' if b.endswith('attn') else 'fc1'}" for b in BRANCHES]
    steps = stream(dense).branches
    modules = [*((name, False) for name in inside), *((branch.reader, True) for branch in steps)]
    with torch.no_grad(), capture(dense, modules) as activations:
        dense(images(max(height, width))[:, :, :height, :width])
    for branch, name in zip(steps, inside, strict=True):
        assert torch.equal(
            branch.tokens(activations[name]), activations[branch.reader].flatten(1, -2)
        )


ALL = Sampling(images=24, tokens=None, class_token_weight=1.0)
HIDDEN = [f"{block}.mlp.hidden" for block in BLOCKS]


def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(24, 3, 10, 10, generator=generator, dtype=torch.float64)
    return nn.functional.interpolate(low, size=SIZE, mode="bilinear")


@cache
def calibrated() -> Calibrate:
    names = [*HIDDEN, "layers.0.blocks.1.attn.v", "layers.0.blocks.1.attn.qk"]
    phase = Calibrate(net(), sites=names, sampling=ALL, taylor=True)
    phase.on_train_start()
    for start in (0, 8, 16):
        phase.training_step((pictures()[start : start + 8], None), start)
    phase.on_train_end()
    return phase


def test_moments_of_attention_are_of_the_maps_tokens_not_of_the_filling() -> None:
    block = net().layers[0].blocks[1]
    moments = calibrated().evidence().moments
    names = [("layers.0.blocks.1.norm1", False), ("layers.0.blocks.1.attn.proj", False)]
    with torch.no_grad(), capture(net(), names) as flows:
        net()(pictures())
        x = flows["layers.0.blocks.1.norm1"].flatten(1, 2)
        q = block.norm1(x) @ block.attn.qkv.weight[:12].T + block.attn.qkv.bias[:12]
        read = flows["layers.0.blocks.1.attn.proj"]
    weights = 1 / x.float().var(-1)
    weights = (weights / weights.mean(1, keepdim=True)).double()
    mean = (weights[..., None] * q).sum((0, 1)) / weights.sum()
    qk = moments["layers.0.blocks.1.attn.qk"]
    assert torch.allclose(qk["q.mean"].flatten().double(), mean, atol=1e-5)
    order = stream(net()).branches[2]
    rows = order.tokens(read)
    mean = (weights[..., None] * rows).sum((0, 1)) / weights.sum()
    assert torch.allclose(moments["layers.0.blocks.1.attn.proj"]["mean"].double(), mean, atol=1e-5)


def test_first_order_effects_are_those_of_a_gate_on_each_unit() -> None:
    proj = net().layers[0].blocks[1].attn.proj
    expected = torch.zeros(12, dtype=torch.float64)
    for image in pictures().split(1):
        gate = torch.ones(12, dtype=torch.float64, requires_grad=True)
        handle = proj.register_forward_pre_hook(lambda m, args, g=gate: args[0] * g)
        logits = net()(image)
        handle.remove()
        loss = nn.functional.cross_entropy(logits, logits.argmax(1))
        expected += torch.autograd.grad(loss, gate)[0].abs()
    actual = calibrated().evidence().moments["layers.0.blocks.1.attn.proj"]["taylor"]
    assert torch.allclose(actual, expected)


@pytest.mark.parametrize("drops", [(), (BRANCHES[2], BRANCHES[3])], ids=["all blocks", "three"])
def test_profiles_are_of_the_maps_tokens(drops: Collection[str]) -> None:
    plan = Plan(model=MODEL, edits=tuple(Drop(branch=name) for name in drops))
    small = cut(net(), plan)
    pieces = {
        name: Piece(name, 0, *small.get_parameter(f"{name}.weight").shape)
        for name in ("layers.0.blocks.0.attn.qkv", "layers.1.blocks.1.attn.proj")
    }
    phase = Profile(
        small, pieces=pieces, decomposition="whitening", sampling=ALL, gradient_images=0
    )
    phase.on_train_start()
    phase.training_step((pictures(), None), 0)
    phase.on_train_end()
    statistics = phase.evidence().moments["layers.0.blocks.0.attn.qkv"]
    with torch.no_grad():
        x = small.layers[0].blocks[0].norm1(small.patch_embed(pictures())).flatten(0, 2)
    assert torch.allclose(statistics["mean"].double(), x.mean(0), atol=1e-6)
    assert torch.allclose(statistics["cov"].double(), x.T.cov(correction=0), atol=1e-5)


def stream_error(small: nn.Module, dense: nn.Module) -> float:
    """Return the squared error of the stream after the first stage."""
    with torch.no_grad():
        ours, theirs = (n.layers[0](n.patch_embed(pictures())) for n in (small, dense))
    return float((ours - theirs).square().sum())


def test_refitting_brings_the_stream_nearer() -> None:
    plan = plan_of({site: range(0, sites(net())[site].size, 2) for site in HIDDEN})
    small = cut(net(), plan)
    before = stream_error(small, net())
    settings = {"sampling": ALL, "ridge": 1e-6, "closing_ridge": 1.0}
    phase = Refit(small, net(), **settings)
    phase.on_train_start()
    for epoch in (0, 1):
        for part in pictures().split(8):
            phase.observe(part, epoch)
        phase.solve(epoch)
    assert stream_error(small, net()) < 0.9 * before


@pytest.mark.parametrize("layers", [("attn.proj",), ("attn.qkv", "mlp.fc2")], ids=str)
def test_regression_brings_the_stream_nearer(layers: Sequence[str]) -> None:
    ranks = [LowRank(linear=f"{block}.{name}", rank=4) for block in BLOCKS for name in layers]
    small = cut(net(), Plan(model=MODEL, edits=tuple(ranks)))
    before = stream_error(small, net())
    phase = Regress(small, net(), sampling=ALL, ridge=1e-7)
    phase.on_train_start()
    for part in pictures().split(8):
        phase.training_step((part, None), 0)
    phase.on_train_epoch_end()
    assert stream_error(small, net()) < 0.9 * before


def test_regression_of_full_ranks_changes_nothing() -> None:
    ranks = [LowRank(linear=f"{block}.attn.proj", rank=12) for block in BLOCKS[:2]]
    small = cut(net(), Plan(model=MODEL, edits=tuple(ranks)))
    phase = Regress(small, net(), sampling=ALL, ridge=1e-7)
    phase.on_train_start()
    phase.training_step((pictures(), None), 0)
    phase.on_train_epoch_end()
    assert relative_error(outputs(small, images(SIZE)), outputs(net(), images(SIZE))) < 1e-5

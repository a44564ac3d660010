"""Closed-form compensation: exact where possible, and never worse than a simpler one."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from calibration import ALL, RIDGE, calibrated, doubled, pictures, reconstructed
from nets import images, outputs, plan_of, relative_error, small_net
from vitrim import cut
from vitrim.closed_form.moments import MomentsError
from vitrim.closed_form.reconstruction import COMPENSATIONS, reconstruct, ridge_solve
from vitrim.network import structure


def read(net: nn.Module, name: str, x: Tensor) -> Tensor:
    """Return the input of a layer."""
    inputs: list[Tensor] = []
    layer = net.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        net(x)
    handle.remove()
    return inputs[0].flatten(0, 1)


def layer_error(net: nn.Module, small: nn.Module, index: Sequence[int], weights: Tensor) -> float:
    """Return the squared error of fc2's output when its kept inputs are the dense net's."""
    x = read(net, "blocks.0.mlp.fc2", pictures())
    dense, compact = net.blocks[0].mlp.fc2, small.blocks[0].mlp.fc2
    with torch.no_grad():
        error = (dense(x) - compact(x[:, index])).square().sum(1)
    return float((error * weights).sum())


def token_weights(net: nn.Module) -> Tensor:
    x = read(net, "blocks.0.norm2", pictures()).unflatten(0, (24, -1))
    return ALL.weights(x, n_prefix_tokens=1, n_readout_tokens=1).flatten()


@given(kept=st.sets(st.integers(0, 47), min_size=1, max_size=47))
def test_bias_is_never_worse_than_nothing_and_ridge_never_worse_than_bias(kept: set[int]) -> None:
    net = small_net()
    plan = plan_of({"blocks.0.mlp.hidden": sorted(kept)})
    evidence = calibrated(net, ["blocks.0.mlp.hidden"])
    weights = token_weights(net)
    errors = [
        layer_error(net, reconstructed(net, plan, evidence, kind), sorted(kept), weights)
        for kind in ("none", "bias", "ridge")
    ]
    assert errors[2] <= errors[1] * (1 + 1e-6) <= errors[0] * (1 + 1e-5)


@pytest.mark.parametrize("kind", COMPENSATIONS)
def test_nothing_is_changed_where_nothing_is_removed(kind: str) -> None:
    net = small_net()
    plan = plan_of({"blocks.1.mlp.hidden": range(40)})
    evidence = calibrated(net, ["blocks.0.mlp.hidden", "blocks.1.mlp.hidden", "blocks.0.attn.qk"])
    small = reconstructed(net, plan, evidence, kind)
    for name, parameter in small.named_parameters():
        if not name.startswith("blocks.1.mlp"):
            assert torch.equal(parameter, net.get_parameter(name))
    values = reconstruct(
        net,
        cut(net, plan_of({})),
        structure(net),
        plan_of({}),
        evidence.moments,
        kind=kind,
        ridge=RIDGE,
    )
    assert values == {}


@pytest.mark.parametrize("kind", ["ridge", "sequential"])
def test_of_equal_units_one_can_go_and_the_output_stays(kind: str) -> None:
    net = doubled(small_net())
    plan = plan_of({"blocks.0.mlp.hidden": [*range(0, 24, 2), *range(25, 48, 2)]})
    small = reconstructed(net, plan, calibrated(net, ["blocks.0.mlp.hidden"]), kind)
    assert relative_error(outputs(small, images()), outputs(net, images())) < 1e-5


def test_the_smaller_query_key_product_is_nearer_than_slices() -> None:
    net = small_net()
    plan = plan_of({"blocks.0.attn.qk": [*range(5), *range(8, 16), 17, 20]})
    evidence = calibrated(net, ["blocks.0.attn.qk"])
    errors = []
    for kind in ("none", "bias", "ridge"):
        small = reconstructed(net, plan, evidence, kind)
        errors.append(relative_error(outputs(small, pictures()), outputs(net, pictures())))
    assert errors[0] == errors[1] > 1.2 * errors[2]


def test_the_smaller_product_of_a_head_of_that_rank_is_exact() -> None:
    net = small_net()
    with torch.no_grad():  # head 0: queries and keys of rank 4
        for start in (0, 24):
            mix = torch.randn(8, 4, generator=torch.Generator().manual_seed(start)).double()
            qkv = net.blocks[0].attn.qkv
            qkv.weight[start : start + 8] = mix @ qkv.weight[start : start + 4]
            qkv.bias[start : start + 8] = mix @ qkv.bias[start : start + 4]
    plan = plan_of({"blocks.0.attn.qk": [0, 1, 2, 7, *range(8, 24)]})
    small = reconstructed(net, plan, calibrated(net, ["blocks.0.attn.qk"]), "ridge")
    assert relative_error(outputs(small, images()), outputs(net, images())) < 1e-5


def test_missing_or_broken_moments_name_the_layer() -> None:
    net = small_net()
    plan = plan_of({"blocks.0.mlp.hidden": [1, 2]})
    broken: list[Mapping[str, Mapping[str, Tensor]]] = [
        {},
        {"blocks.0.mlp.fc2": {"mean": torch.full((48,), torch.nan), "cov": torch.eye(48)}},
    ]
    for moments in broken:
        with pytest.raises(MomentsError, match=r"blocks\.0\.mlp\.fc2"):
            reconstruct(
                net, cut(net, plan), structure(net), plan, moments, kind="ridge", ridge=RIDGE
            )


def test_a_ridge_below_rounding_gives_a_finite_answer() -> None:
    cov = torch.ones(4, 4, dtype=torch.float64) - 1e-7 * torch.eye(4, dtype=torch.float64)
    solution = ridge_solve(cov, cov[:, :2], 1e-9)
    assert bool(torch.isfinite(solution).all())
    assert torch.allclose(cov @ solution, cov[:, :2], atol=1e-5)

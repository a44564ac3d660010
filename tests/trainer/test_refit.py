"""Sequential regression: exact where the kept units can do it, better than the fold elsewhere."""

import pytest
import torch
from torch import nn

from calibration import ALL, calibrated, doubled, pictures, reconstructed
from nets import images, outputs, plan_of, relative_error, small_net
from vitrim import Plan, cut
from vitrim.network import stream
from vitrim.trainer.refit import Refit

SITES = ["blocks.0.mlp.hidden", "blocks.1.mlp.hidden"]


def refitted(small: nn.Module, net: nn.Module) -> nn.Module:
    phase = Refit(small, net, sampling=ALL, ridge=1e-6, closing_ridge=1.0)
    phase.on_train_start()
    for epoch in range(phase.epochs):
        for start in range(0, 24, 8):
            phase.observe(pictures()[start : start + 8], epoch)
        phase.solve(epoch)
    return small


def kept(share: float) -> Plan:
    return plan_of({site: range(int(48 * share)) for site in SITES})


def test_of_equal_units_one_can_go_and_the_output_stays() -> None:
    net = doubled(small_net())
    plan = plan_of({"blocks.0.mlp.hidden": range(24)})
    small = refitted(cut(net, plan), net)
    assert relative_error(outputs(small, images()), outputs(net, images())) < 1e-4


@pytest.mark.parametrize("args", [{}, {"init_values": 0.3}, {"proj_bias": False}])
def test_the_stream_comes_nearer_than_by_folding_alone(args: dict[str, object]) -> None:
    net = small_net(**args)
    evidence = calibrated(net, SITES)
    errors = []
    for compact in (
        reconstructed(net, kept(0.5), evidence, "ridge"),
        refitted(reconstructed(net, kept(0.5), evidence, "ridge"), net),
    ):
        with torch.no_grad():
            ours, dense = (n.blocks(stream(n).embed(pictures())) for n in (compact, net))
        errors.append(float((ours - dense).square().sum()))
    assert errors[1] < errors[0]


def test_what_was_not_cut_is_not_touched_but_for_the_classifier() -> None:
    net = small_net()
    small = refitted(cut(net, plan_of({SITES[0]: range(40)})), net)
    for name, parameter in small.named_parameters():
        if not name.startswith(("blocks.0.mlp", "head")):
            assert torch.equal(parameter, net.get_parameter(name))


def test_layers_that_read_value_dims_stay_as_they_were_folded() -> None:
    net = small_net()
    plan = plan_of({"blocks.0.attn.v": range(2, 24), SITES[1]: range(30)})
    evidence = calibrated(net, ["blocks.0.attn.v", *SITES])
    folded = reconstructed(net, plan, evidence, "ridge")
    small = refitted(reconstructed(net, plan, evidence, "ridge"), net)
    changed = {
        name
        for name, parameter in small.named_parameters()
        if not torch.equal(parameter, folded.get_parameter(name))
    }
    assert changed == {
        "blocks.1.mlp.fc2.weight",
        "blocks.1.mlp.fc2.bias",
        "head.weight",
        "head.bias",
    }


def test_following_the_stream_is_running_the_network() -> None:
    for args in ({}, {"init_values": 0.3}, {"num_classes": 3, "global_pool": "avg"}):
        net = small_net(**args)
        found = stream(net)
        x = found.embed(images())
        with torch.no_grad():
            for branch in found.branches:
                x = x + branch.apply(x)
            assert torch.allclose(net.norm(x), net.forward_features(images()))

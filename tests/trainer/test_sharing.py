"""A phase that trains nothing reads the weights of the dense network; it keeps no copy."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning import LightningModule
from torch import nn

from vitrim.errors import ConfigError
from vitrim.trainer.sharing import shared_weights


class _Reads(LightningModule):
    epochs = 1
    calibration_images = 8
    clip_norm = 0.0
    resumes_at = "never"

    def __init__(self, net: nn.Module, *, trains: bool) -> None:
        super().__init__()
        self.net, self.trains = net, trains


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def _pointers(net: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in net.parameters()]


@pytest.mark.parametrize("trains", [False, True])
def test_weights_are_shared_where_nothing_is_trained(trains: bool) -> None:
    dense = _net()
    phase = _Reads(copy.deepcopy(dense), trains=trains)
    with shared_weights(phase, dense):
        assert (_pointers(phase.net) == _pointers(dense)) is not trains
    running = [net.get_buffer("1.running_mean").data_ptr() for net in (phase.net, dense)]
    assert running[0] != running[1]


def test_what_a_phase_changed_before_is_its_own() -> None:
    dense = _net()
    net = copy.deepcopy(dense)
    with torch.no_grad():
        net.get_parameter("0.weight").mul_(2)
    net.set_submodule("2", nn.Linear(3, 5))
    before = copy.deepcopy(dense.state_dict())
    with shared_weights(_Reads(net, trains=False), dense):
        with torch.no_grad():
            net.get_parameter("0.weight").zero_()
            net.get_parameter("2.bias").zero_()
        shared = [a == b for a, b in zip(_pointers(net), _pointers(dense), strict=True)]
    assert shared == [False, True, True, True, False, False]
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_a_change_in_place_is_refused_and_loading_the_same_is_none() -> None:
    dense = _net()
    phase = _Reads(copy.deepcopy(dense), trains=False)
    with shared_weights(phase, dense):
        phase.net.load_state_dict(copy.deepcopy(dense.state_dict()))
    with (
        pytest.raises(ConfigError, match=r"_Reads.trains=False, but it changed 2\.weight of its"),
        shared_weights(phase, dense),
        torch.no_grad(),
    ):
        phase.net.get_parameter("2.weight").add_(1)


def test_a_network_without_values_shares_nothing() -> None:
    dense = _net().to("meta")
    with shared_weights(_Reads(copy.deepcopy(dense), trains=False), dense):
        pass

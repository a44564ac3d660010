"""A pass over calibration images, and networks reconstructed from its evidence."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nets import images
from vitrim import Plan, cut
from vitrim.closed_form.reconstruction import reconstruct
from vitrim.network import structure
from vitrim.plan import Evidence
from vitrim.trainer.calibrate import Calibrate, Sampling

ALL = Sampling(images=64, tokens=None, class_token_weight=1.0)


RIDGE = 1e-6


def calibrated(net: nn.Module, sites: Sequence[str], n: int = 24) -> Evidence:
    """Return the evidence of one pass, as the trainer runs it."""
    phase = Calibrate(net, sites=sites, sampling=ALL, taylor=False)
    phase.on_train_start()
    for start in range(0, n, 8):
        phase.training_step((pictures(n)[start : start + 8], None), start)
    phase.on_train_end()
    return phase.evidence()


def pictures(n: int = 24) -> Tensor:
    return images(batch=n)


def reconstructed(net: nn.Module, plan: Plan, evidence: Evidence, kind: str) -> nn.Module:
    """Return the compact net of `plan` with its weights compensated."""
    small = cut(net, plan)
    values = reconstruct(net, small, structure(net), plan, evidence.moments, kind=kind, ridge=RIDGE)
    with torch.no_grad():
        for name, value in values.items():
            small.get_parameter(name).copy_(value)
    return small


def doubled(net: nn.Module) -> nn.Module:
    """Return a copy whose hidden units 24 to 47 of block 0 equal units 0 to 23."""
    twin = copy.deepcopy(net)
    mlp = twin.blocks[0].mlp
    with torch.no_grad():
        mlp.fc1.weight[24:] = mlp.fc1.weight[:24]
        mlp.fc1.bias[24:] = mlp.fc1.bias[:24]
    return twin

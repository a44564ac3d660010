"""What scorers cost: a pass over images with statistics, against the forward pass alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from vitrim.cli.compose import CONF

from .timing import Row, Side, take_turns

DEIT = "deit_base_patch16_224"
NETS = {"vit_tiny_patch16_224": 48, DEIT: 16}
"""Batch size by network."""


def method_of(kind: str, name: str) -> Any:
    """Return the method `kind` with its yaml's numbers for timm's network `name`."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"method={kind}", "model=timm", f"model.name={name}"])
    return instantiate(cfg.method, _convert_="all")


def net_of(name: str) -> nn.Module:
    """Return timm's network with random weights, always the same ones."""
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def against_forward(
    what: str,
    name: str,
    net: nn.Module,
    step: Callable[[Tensor], Any],
    repeats: int,
    *,
    limit: float = 1.5,
) -> Row:
    """Return the cost of `step` on a batch of images over that of `net`."""
    batch = NETS[name]
    x = torch.randn(batch, 3, 224, 224)
    sides = {
        "ours": Side(work=lambda _: step(x)),
        "peer": Side(work=lambda _: _forward(net, x)),
    }
    seconds = take_turns(sides, repeats)
    return Row(
        name=f"{what} {name.split('_patch')[0]}, batch {batch}",
        peer="the same images through the network",
        ours_s=seconds["ours"],
        peer_s=seconds["peer"],
        kind="cost",
        limit=limit,
    )


@torch.no_grad()
def _forward(net: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = net(x)
    return logits

"""One training step with VTP's gates: against the dense step, and with gates on the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.method.vtp import GateTraining
from vitrim.network import structure
from vitrim.trainer.classify import Classify
from vitrim.trainer.recipe import Recipe, optimizer_and_schedule

from .timing import Row, Side, take_turns

BATCH = 16
RECIPE = Recipe(epochs=1, lr=1e-4, weight_decay=0.05, warmup_epochs=0, clip_norm=0.0)
L1 = 1e-4


def rows(repeats: int) -> list[Row]:
    """Return the step's cost over the dense step's, and that of the usual alternative."""
    torch.manual_seed(0)
    batch = torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,))
    dense = Classify(_net(), recipe=RECIPE, n_classes=1000)
    gated = GateTraining(_net(), recipe=RECIPE, l1=L1, gate_lr=1e-4)
    hooked = Hooked(_net())
    _check_equal(gated, hooked, batch)
    sides = {
        "dense": Side(work=_step(dense, (), batch)),
        "ours": Side(work=_step(gated, gated.gates, batch)),
        "hooks": Side(work=_step(hooked, hooked.gates, batch)),
    }
    seconds = take_turns(sides, 4 * repeats)
    name = "ViT-Ti step"
    return [
        Row(
            name=f"{name}, gates on weights",
            peer="the dense step",
            ours_s=seconds["ours"],
            peer_s=seconds["dense"],
            kind="cost",
            limit=1.10,
        ),
        Row(
            name=f"{name}, gates on activations",
            peer="the dense step",
            ours_s=seconds["hooks"],
            peer_s=seconds["dense"],
            kind="cost",
        ),
    ]


class Hooked(LightningModule):
    """The usual way to gate: multiply the activations in pre-hooks of the layers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.gates = nn.ParameterList()
        for layer in structure(net).layers:
            site = layer.inp[0].site
            if site is not None:
                gate = nn.Parameter(torch.ones(layer.inp[0].size))
                self.gates.append(gate)
                net.get_submodule(layer.name).register_forward_pre_hook(_multiply(gate))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss L_CE + l1 * sum |a|, as VTP does."""
        images, targets = batch
        penalty = torch.cat([gate.abs() for gate in self.gates]).sum()
        return nn.functional.cross_entropy(self.net(images), targets) + L1 * penalty


def _multiply(gate: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    return lambda module, args: args[0] * gate


def _net() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224").train()


def _step(
    phase: LightningModule, gates: Iterable[Tensor], batch: tuple[Tensor, Tensor]
) -> Callable[[Any], None]:
    """Return one optimiser step of `phase`, without a Trainer and thus without logging."""
    phase.log = phase.log_dict = lambda *args, **kwargs: None
    group = {"params": list(gates), "lr": RECIPE.lr, "weight_decay": 0.0}
    optimizer, _ = optimizer_and_schedule(phase.net, RECIPE, steps=10_000, extra=[group])

    def step(_: Any) -> None:
        optimizer.zero_grad()
        phase.training_step(batch, 0).backward()
        optimizer.step()

    return step


def _check_equal(ours: GateTraining, peer: Hooked, batch: tuple[Tensor, Tensor]) -> None:
    """Raise unless gates on weights and on activations have the same gradients."""
    gradients = []
    for phase in (ours, peer):
        phase.log = phase.log_dict = lambda *args, **kwargs: None
        loss = phase.training_step(batch, 0)
        gradients.append(torch.cat(torch.autograd.grad(loss, list(phase.gates))))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)

"""Gates as parametrisations of somebody else's network: W diag(a) in place of W, a = 1 at first.

The network's own optimiser trains them. They get a parameter group of their own, without weight
decay, which follows the learning rate schedule of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from vitrim.network.attention import own_name

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_RATES_OF_SCHEDULER = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")


class Gate(nn.Module):
    """One factor per input column of a weight (out, in, ...)."""

    def __init__(self, size: int, like: Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(size, device=like.device, dtype=like.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with every column multiplied by its gate."""
        return weight * self.gate.view(-1, *(1,) * (weight.ndim - 2))


class Gates:
    """The gates of one network, one per unit of each site.

    Args:
        net: the network, which gets them.
        sites: the weights whose input columns belong to one site: parameter name -> site name.
        sizes: the number of units of each site.
    """

    def __init__(self, net: nn.Module, sites: Mapping[str, str], sizes: Mapping[str, int]) -> None:
        self._by_site: dict[str, Gate] = {}
        self._layers: list[nn.Module] = []
        for name, site in sites.items():
            path, _, last = own_name(net, name).rpartition(".")
            layer = net.get_submodule(path)
            if site not in self._by_site:
                self._by_site[site] = Gate(sizes[site], layer.get_parameter(last))
            parametrize.register_parametrization(layer, last, self._by_site[site])
            self._layers.append(layer)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The gates of every site, each (size,)."""
        return [gate.gate for gate in self._by_site.values()]

    def scores(self) -> dict[str, Tensor]:
        """Return |a| by site."""
        return {site: gate.gate.detach().abs().cpu() for site, gate in self._by_site.items()}

    def fold(self) -> None:
        """Multiply the gates into the weights and remove them: the network computes the same."""
        for layer in self._layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        self._layers = []

    def add_l1(self, optimizer: Optimizer, l1: float) -> None:
        """Add the gradient of l1 * sum |a| to the gates that `optimizer` is about to step."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for gate in self.parameters:
            if id(gate) in held:
                penalty = l1 * gate.detach().sign()
                gate.grad = penalty if gate.grad is None else gate.grad + penalty

    def set_rate(
        self, optimizers: Sequence[Optimizer], schedulers: Sequence[Any], rate: float | None
    ) -> None:
        """Give the gates a parameter group of their own beside that of their weights.

        Args:
            optimizers: those that train the network, made before or after the gates.
            schedulers: of their learning rates.
            rate: the learning rate of the gates where that of their weights is at its base value;
                None: the same as that of the weights.
        """
        gates = {id(gate) for gate in self.parameters}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in gates]
        optimizer, index = self._home(optimizers)
        group = optimizer.param_groups[index]
        base = group.get("initial_lr", group["lr"])
        factor = 1.0 if rate is None else rate / base if base else 0.0
        own = {key: value for key, value in group.items() if key != "params"}
        own |= {key: own[key] * factor for key in _RATES if key in own}
        own |= {"weight_decay": 0.0} if "weight_decay" in own else {}
        optimizer.add_param_group({"params": self.parameters, **own})
        for scheduler in schedulers:
            if getattr(scheduler, "optimizer", None) is optimizer:
                _extend(scheduler, index, factor)

    def _home(self, optimizers: Sequence[Optimizer]) -> tuple[Optimizer, int]:
        """Return the optimiser and the group that train most of the gated weights."""
        gated = {id(layer.parametrizations["weight"].original) for layer in self._layers}  # type: ignore[union-attr,index]
        groups = [
            (sum(id(p) in gated for p in group["params"]), optimizer, index)
            for optimizer in optimizers
            for index, group in enumerate(optimizer.param_groups)
        ]
        _, optimizer, index = max(groups, key=lambda item: item[0])
        return optimizer, index


def _extend(scheduler: Any, index: int, factor: float) -> None:
    """Let a scheduler treat one more group as it treats group `index`, at `factor` of its rate."""
    for nested in getattr(scheduler, "_schedulers", ()):
        _extend(nested, index, factor)
    for name in _RATES_OF_SCHEDULER:
        if isinstance(rates := getattr(scheduler, name, None), list):
            rates.append(rates[index] * factor)
    if isinstance(functions := getattr(scheduler, "lr_lambdas", None), list):
        functions.append(functions[index])

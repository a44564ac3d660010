"""Low-rank updates of a network's matrices (LoRA, arXiv 2106.09685), merged after training."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitrim.closed_form.moments import key_of
from vitrim.errors import ConfigError
from vitrim.trainer.calibrate import classifiers


def matrices(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights (out, in) of all layers of `net` but its classifiers, by name."""
    heads = {f"{name}.weight" for name, _ in classifiers(net)}
    return {
        name: parameter
        for name, parameter in net.named_parameters()
        if parameter.ndim == 2 and name.endswith(".weight") and name not in heads
    }


class LowRankUpdates(nn.Module):
    """W + up @ down for every matrix W (out, in) of a network, with up (out, r) and down (r, in).

    `up` begins with zeros, so that the network is unchanged; `down` is drawn, with the variance of
    1 / in. The weights of `net` themselves are not registered here.

    Raises:
        ConfigError: the network has no such layers.
    """

    def __init__(self, net: nn.Module, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self._names = {key_of(name): name for name in matrices(net)}
        if not self._names:
            raise ConfigError(
                "method.tuning.recovery.trained=low_rank: this network has no Linear layers before "
                "its classifier; set all or scales"
            )
        generator = torch.Generator().manual_seed(0)
        for key, name in self._names.items():
            weight = net.get_parameter(name)
            n_out, n_in = weight.shape
            r = min(rank, n_out, n_in)
            down = torch.randn(r, n_in, generator=generator) / n_in**0.5
            self.down[key] = nn.Parameter(down.to(weight))
            self.up[key] = nn.Parameter(torch.zeros(n_out, r).to(weight))

    def weights(self, net: nn.Module) -> Mapping[str, Tensor]:
        """Return the updated weights of `net`, by name."""
        return {
            name: net.get_parameter(name) + self.up[key] @ self.down[key]
            for key, name in self._names.items()
        }

    @torch.no_grad()
    def merge(self, net: nn.Module) -> None:
        """Write the updated weights into `net`; the updates are zero from then on."""
        for name, weight in self.weights(net).items():
            net.get_parameter(name).copy_(weight)
        for up in self.up.values():
            up.zero_()

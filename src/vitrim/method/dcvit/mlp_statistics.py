"""Statistics of MLPs as they are once the attention before them is removed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, key_of
from vitrim.network.stream import BranchStep
from vitrim.trainer.calibrate import capture


class MLPStatistics(nn.Module):
    """Moments of MLP units without the attention, and of what the whole block adds to the stream.

    Rows have M + D numbers for each token: the units' values, then what attention and MLP together
    add, before the layer scale.

    Args:
        net: whose MLPs these are.
        ends: the last layer of each MLP.
    """

    def __init__(self, net: nn.Module, ends: Iterable[str]) -> None:
        super().__init__()
        self.moments = nn.ModuleDict()
        for end in ends:
            rows, columns = net.get_submodule(end).get_parameter("weight").shape
            self.moments[key_of(end)] = Moments(end, rows + columns)

    def add(
        self,
        net: nn.Module,
        branch: BranchStep,
        end: str,
        streams: tuple[Tensor, Tensor],
        weights: Tensor,
    ) -> None:
        """Add tokens to the statistics of one MLP.

        Args:
            net: the dense network.
            branch: the MLP.
            end: its last layer.
            streams: the stream before the block's attention and after its MLP, (B, n, D) each.
            weights: what each token counts, (B, n).
        """
        before, after = streams
        with capture(net, [(end, False)]) as inputs:
            branch.apply(before)
        added = branch.unscaled(after - before)
        rows = torch.cat([branch.tokens(inputs[end]), added], dim=-1)
        self._of(end).add(rows.flatten(0, 1), weights.flatten())

    def finish(self) -> None:
        """Bring sums into their final form."""
        for moments in self.moments.values():
            assert isinstance(moments, Moments)
            moments.finish()

    def tensors(self, end: str) -> dict[str, Tensor]:
        """Return the finished moments of the MLP with the last layer `end`, by name."""
        return self._of(end).tensors()

    def _of(self, end: str) -> Moments:
        moments = self.moments[key_of(end)]
        assert isinstance(moments, Moments)
        return moments

"""Statistics of MLPs as they are once the attention before them is removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, add_to, full_precision, key_of
from vitrim.network import stream
from vitrim.network.stream import BranchStep
from vitrim.trainer.activations import Batches, capture
from vitrim.trainer.calibrate import Sampling, gather_tokens

Gathered = Literal["none", "mean", "moments", "regression"]
"""How much is gathered of each MLP (`MLPStatistics`)."""


class CompressedMLP(NamedTuple):
    """The branches of a block's attention and MLP, and the path of the MLP's last layer."""

    attention: str
    mlp: str
    end: str


class MLPStatistics(nn.Module):
    """Means or moments of MLP units without the attention, and of what the whole block adds.

    Of `gathered`, "mean" has the units' means, (M,). "moments" has means and covariances of the
    units' values, (M,) and (M, M). "regression" has those of rows with M + D numbers for each
    token, the units' values and what attention and MLP together add before the layer scale. Memory
    does not depend on the number of images.

    Args:
        net: whose MLPs these are.
        mlps: the MLPs, in network order.
        gathered: how much.
        sampling: of their tokens.
    """

    def __init__(
        self,
        net: nn.Module,
        mlps: list[CompressedMLP],
        gathered: Gathered,
        sampling: Sampling,
    ) -> None:
        super().__init__()
        self.gathered: Gathered = gathered if mlps else "none"
        self.mlps = mlps
        self.sampling = sampling
        self.moments = nn.ModuleDict()
        if self.gathered != "none":
            self._stream = stream(net)
            self._branches = {branch.name: branch for branch in self._stream.branches}
        for mlp in mlps:
            rows, columns = net.get_submodule(mlp.end).get_parameter("weight").shape
            channels = columns + (rows if self.gathered == "regression" else 0)
            if self.gathered in ("moments", "regression"):
                self.moments[key_of(mlp.end)] = Moments(mlp.end, channels)
        for name in self._buffers_of(*(mlp.end for mlp in mlps)):
            self.register_buffer(key_of(name), torch.empty(0))
        self._seen = 0
        self._batches = Batches(self._points() if self.gathered != "none" else [])

    def _buffers_of(self, *ends: str) -> list[str]:
        """Return the names of the statistics besides moments."""
        if self.gathered == "mean":
            return [f"{end}.{part}" for end in ends for part in ("mean", "weight")]
        return []

    def add(self, net: nn.Module, images: Tensor) -> None:
        """Add images (B, C, H, W); `net` is the dense network in eval mode."""
        if self.gathered == "none":
            return
        with torch.no_grad(), full_precision(images):
            for few in self._batches.of(images, net):
                with capture(net, self._points()) as activations:
                    net(few)
                for mlp in self.mlps:
                    self._add_mlp(net, mlp, activations)
                self._seen += len(few)

    def _points(self) -> list[tuple[str, bool]]:
        """Return the modules whose inputs are captured."""
        before = [self._branches[mlp.attention].reader for mlp in self.mlps]
        after = [self._stream.reader_after(self._branches[mlp.mlp]) for mlp in self.mlps]
        return [(name, False) for name in dict.fromkeys([*before, *after])]

    def _add_mlp(
        self, net: nn.Module, mlp: CompressedMLP, activations: Mapping[str, Tensor]
    ) -> None:
        """Add the sampled tokens of a batch to the statistics of one MLP."""
        branch = self._branches[mlp.mlp]
        x = activations[self._stream.reader_after(branch)]
        n_prefix = self._stream.n_prefix_tokens
        index = self.sampling.index(x, n_prefix, self._seen)
        before, after = (
            gather_tokens(part, index)
            for part in (activations[self._branches[mlp.attention].reader], x)
        )
        weights = self.sampling.weights(after, n_prefix, self._stream.n_readout_tokens).flatten()
        rows = self._units(net, branch, mlp.end, before)
        if self.gathered == "mean":
            units, weight = rows.flatten(0, 1).double(), weights.double()
            add_to(self, f"{mlp.end}.mean", (units * weight[:, None]).sum(0))
            add_to(self, f"{mlp.end}.weight", weight.sum())
            return
        if self.gathered == "regression":
            rows = torch.cat([rows, branch.unscaled(after - before)], dim=-1)
        moments = self.moments[key_of(mlp.end)]
        assert isinstance(moments, Moments)
        moments.add(rows.flatten(0, 1), weights)

    def _units(self, net: nn.Module, branch: BranchStep, end: str, before: Tensor) -> Tensor:
        """Return the units' values (B, n, M) for the stream before the block's attention."""
        with capture(net, [(end, False)]) as inputs:
            branch.apply(before)
        return branch.tokens(inputs[end])

    def finish(self) -> None:
        """Bring sums into their final form."""
        for moments in self.moments.values():
            assert isinstance(moments, Moments)
            moments.finish()
        if self.gathered == "mean":
            for mlp in self.mlps:
                mean, weight = (
                    self.get_buffer(key_of(f"{mlp.end}.{part}")) for part in ("mean", "weight")
                )
                self.register_buffer(key_of(f"{mlp.end}.mean"), (mean / weight).cpu())

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what was gathered, by layer: `trial.mean`, `trial.cov` and `trial.weight`."""
        found: dict[str, dict[str, Tensor]] = {}
        for moments in self.moments.values():
            assert isinstance(moments, Moments)
            parts = moments.tensors().items()
            found[moments.name] = {f"trial.{part}": tensor for part, tensor in parts}
        for name in self._buffers_of(*(mlp.end for mlp in self.mlps)):
            owner, _, part = name.rpartition(".")
            found.setdefault(owner, {})[f"trial.{part}"] = self.get_buffer(key_of(name))
        return found

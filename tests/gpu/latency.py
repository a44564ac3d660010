"""Latency in bf16 at 60 % of the MACs: free and even heads, in every arrangement, against dense."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator

import torch
from torch import nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.budget.trim import trim
from vitrim.measure import count
from vitrim.network.head_runs import ARRANGEMENTS, arrange_heads, sliced_attentions
from vitrim.network.structure import of_kind
from vitrim.network.surgery import cut
from vitrim.network.timing import clock_of, forward_pass, interleaved_times
from vitrim.plan import Plan

from .scale import Finding, Scale

KEPT = 0.6
MOST_OF_MACS, MOST_OF_DENSE = 1.15, 1.0
"""Time over MACs ratio in large batches, and time over the dense network's for one image."""


def findings(scale: Scale) -> Iterator[Finding]:
    """Measure passes of all networks in turns, launched one by one and as graphs."""
    dense = scale.net().eval()
    macs = count(dense, scale.side).macs
    compact = {
        "free": _cut(dense, scale.side, even=False),
        "even heads": _cut(dense, scale.side, even=True),
    }
    share = {name: count(net, scale.side).macs / macs for name, net in compact.items()}
    yield from (
        Finding(f"{name}: runs of heads in a block", f"{_runs(net):.1f}, MACs {share[name]:.3f}")
        for name, net in compact.items()
    )
    nets = {("dense", "", 1.0): dense} | {
        (name, how, share[name]): arrange_heads(copy.deepcopy(net), how)
        for name, net in compact.items()
        for how in (ARRANGEMENTS if name == "free" else ("runs",))
    }
    nets = {key: net.to(torch.bfloat16) for key, net in nets.items()}
    for batch in scale.batches:
        x = scale.images(batch).to(torch.bfloat16)
        for graphs in (False, True) if scale.device != "cpu" else (False,):
            with torch.inference_mode():
                passes = [forward_pass(net, x, graphs=graphs) for net in nets.values()]
                times = interleaved_times(passes, scale.repeats, clock=clock_of(scale.device))
            yield from _lines([*nets], times, batch, graphs=graphs)


def _cut(net: nn.Module, size: int, *, even: bool) -> nn.Module:
    """Return the network without the units of the lowest random scores."""
    cost = Cost(net, size)
    generator = torch.Generator().manual_seed(0)
    scores = {
        site.name: torch.rand(site.size, generator=generator)
        + torch.rand((), generator=generator)  # so that layers and heads differ
        + _of_heads(site.head_dims, generator)
        for site in of_kind(cost.structure, "qk", "v", "hidden")
    }
    target = Target(metric="macs", keep=KEPT)
    edits = trim(cost, scores, target, scope="global", round_to=8, even_heads=even)
    return cut(net, Plan(model={}, edits=edits)).eval()


def _of_heads(head_dims: tuple[int, ...], generator: torch.Generator) -> torch.Tensor | float:
    if not head_dims:
        return 0.0
    each = torch.rand(len(head_dims), generator=generator)
    return each.repeat_interleave(torch.tensor(head_dims))


def _runs(net: nn.Module) -> float:
    found = [len(attention.head_runs) for attention in sliced_attentions(net).values()]
    return statistics.mean(found) if found else 1.0


def _lines(
    keys: list[tuple[str, str, float]], times: list[list[float]], batch: int, *, graphs: bool
) -> Iterator[Finding]:
    dense = times[0]
    for (name, how, share), own in zip(keys, times, strict=True):
        what = f"batch {batch}, {'graph' if graphs else 'eager'}: {name} {how}".rstrip()
        ratio = statistics.median(b / a for a, b in zip(dense, own, strict=True))
        value = f"{statistics.median(own):.3f} ms"
        if own is dense:
            yield Finding(what, value)
        elif batch == 1:
            goal, met = f"<= {MOST_OF_DENSE} x dense", ratio <= MOST_OF_DENSE
            yield Finding(what, f"{value}, {ratio:.2f} x dense", goal, met)
        else:
            over = ratio / share
            goal, met = f"time over MACs <= {MOST_OF_MACS}", over <= MOST_OF_MACS
            yield Finding(what, f"{value}, {ratio:.2f} x dense, over MACs {over:.2f}", goal, met)

"""What dropping blocks saves, as a measured share of latency; and the scores as tensors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vitrim.budget.blocks import Group
from vitrim.jobs import distributed
from vitrim.method.practise.adaptors import Skip, adapted
from vitrim.network.timing import clock_of, interleaved_times
from vitrim.plan import Evidence

_LEAST = 1e-6  # what seems to save nothing is dropped last


def latency_shares(
    net: nn.Module, groups: Sequence[Group], images: Tensor, repeats: int
) -> list[float]:
    """Return by how much latency falls without each group, as a share of the whole network's.

    All networks are timed in turn, so that changes of the machine's speed affect them alike; the
    medians count. Of several processes, each of which must call this, the main one measures.

    Args:
        net: the network, in eval mode.
        groups: the candidates.
        images: of one forward pass, (B, C, H, W), on the device where it is timed.
        repeats: timed passes of each network.
    """
    shares: list[float] | None = None
    if distributed.is_main_process():
        calls = [_pass(net, group, images) for group in ((), *groups)]
        times = interleaved_times(calls, repeats, clock=clock_of(images.device))
        whole, *others = map(statistics.median, times)
        shares = [max(1 - other / whole, _LEAST) for other in others]
    return distributed.broadcast(shares)


def as_scores(errors: Sequence[float], n_images: int, savings: Sequence[float]) -> Tensor:
    """Return mean errors, (candidates,), and if savings are known these in a second row."""
    scores = torch.tensor(errors, dtype=torch.float64) / n_images
    return torch.stack([scores, torch.tensor(savings, dtype=torch.float64)]) if savings else scores


def as_evidence(scores: Tensor, blocks: Sequence[str]) -> Evidence:
    """Return what `as_scores` returned by the first block of each candidate."""
    if not scores.numel():
        return Evidence()
    errors, *savings = scores.reshape(-1, len(blocks)).tolist()
    return Evidence(
        block_scores=dict(zip(blocks, errors, strict=True)),
        block_savings=dict(zip(blocks, savings[0], strict=True)) if savings else {},
    )


def _pass(net: nn.Module, group: Group, images: Tensor) -> Callable[[], None]:
    """Return a forward pass of `net` without `group`."""

    @torch.no_grad()
    def run() -> None:
        with adapted(net, {block: Skip() for block in group}, {}):
            net(images)

    return run

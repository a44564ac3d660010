"""Losses of components as KL divergence from the dense network's decision (`allocation: kl`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import TargetError
from vitrim.method.mixed_rank.pieces import Piece
from vitrim.method.mixed_rank.settings import MixedRankRidges, RankLosses
from vitrim.plan import Evidence, LowRank, Proposal
from vitrim.sensitivity.parts import parts_of
from vitrim.sensitivity.results import probe_table
from vitrim.sensitivity.scorer import LossScorer
from vitrim.sensitivity.settings import LossRidges, Scaling
from vitrim.trainer.calibrate import Sampling


def loss_scorer(
    net: nn.Module,
    layers: Sequence[str],
    *,
    losses: RankLosses,
    ridges: MixedRankRidges,
    sampling: Sampling,
) -> LossScorer:
    """Return the pass forward and back over images that predicts the losses of these layers."""
    return LossScorer(
        net,
        kinds=["ranks"],
        sampling=sampling,
        temperature=losses.temperature,
        ridges=LossRidges(
            order=ridges.metric,  # of units, of which none are scored
            fold=ridges.metric,
            metric=ridges.metric,
            gradient_shrinkage=ridges.gradient_shrinkage,
        ),
        scaling=Scaling(images=losses.images, shares=[0.5]),
        layers=layers,
    )


def check_linear(cost: Cost, pieces: Mapping[str, Piece]) -> None:
    """Raise TargetError if the losses of a layer are not predicted."""
    unread = [piece.layer for piece in pieces.values() if piece.layer not in cost.linears]
    if unread:
        raise TargetError(
            f"method.allocation=kl: the losses of {unread[0]} are not predicted, as it is no "
            "Linear; choose other method.layers or method.allocation=loss"
        )


def losses_of(evidence: Evidence, layers: Sequence[str]) -> dict[str, list[float]]:
    """Return what each component costs, by layer, the best component first."""
    return {name: evidence.scores[name].sort(descending=True).values.tolist() for name in layers}


def proposal_of(
    net: nn.Module,
    evidence: Evidence,
    losses: Mapping[str, Sequence[float]],
    ranks: Mapping[str, int],
) -> Proposal:
    """Return the plan with these ranks, the loss that is predicted for it, and measurements."""
    parts = parts_of(net, ["ranks"], losses.keys())
    table = probe_table(parts, evidence.moments["network"]["probes"])
    return Proposal(
        edits=tuple(LowRank(linear=name, rank=rank) for name, rank in ranks.items()),
        notes={
            "decomposition": "loss",
            "allocation": "kl",
            "predicted_kl": float(sum(sum(losses[name][rank:]) for name, rank in ranks.items())),
        },
        diagnostics={"losses": table} if table else {},
    )

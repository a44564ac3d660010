"""The choices of mixed-rank compression: what conf/method/mixed_rank.yaml sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vitrim.errors import is_count, is_positive, is_rate, require
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.recovery import RecoverySettings

LAYERS = ("qkv", "proj", "fc1", "fc2")
QkvFactors = Literal["fused", "separate"]
"""Whether query, key and value rows share factors."""
Rule = Literal["uniform", "energy", "error", "loss", "kl"]
"""What decides which layers lose components; `kl` is predicted KL divergence, scaled by
measurements."""
Trained = Literal["none", "uncompressed", "all"]
"""The parameters that are trained at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedRankRidges:
    """The ridges of the least-squares problems, relative to the mean variance of their inputs.

    `metric` is for decompositions, `regression` for solving the ends of branches.
    `gradient_shrinkage` is the fraction of the products of gradients by different outputs that is
    left out.
    """

    metric: float
    regression: float
    gradient_shrinkage: float

    def __post_init__(self) -> None:
        is_fraction = is_rate(self.gradient_shrinkage) and self.gradient_shrinkage <= 1
        require(
            "method.ridges",
            self,
            ("metric", is_positive(self.metric), "a number above 0"),
            ("regression", is_positive(self.regression), "a number above 0"),
            ("gradient_shrinkage", is_fraction, "a number in 0..1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLosses:
    """How the losses of the rule `kl` are found.

    Args:
        temperature: of the decision whose KL divergence is the loss.
        images: on which the loss of every layer at half its break-even rank is measured, the first
            of the calibration images. 0: predictions stay as they are.
    """

    temperature: float
    images: int

    def __post_init__(self) -> None:
        counts = self.images == 0 or is_count(self.images)
        require(
            "method.losses",
            self,
            ("temperature", is_positive(self.temperature), "a number above 0"),
            ("images", counts, "a whole number from 0 on"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidualSettings:
    """A residual of `rank`, trained by `training`, in every factorised layer; 0 for none."""

    rank: int
    training: Recipe

    def __post_init__(self) -> None:
        fits = self.rank == 0 or is_count(self.rank)
        require("method.residual", self, ("rank", fits, "a whole number from 0 on"))


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedRankTuning:
    """Training at the end, of which parameters and how: to mimic the dense network's features.

    `pooled_weight` weighs the error of what the classifier reads against that of all tokens.
    `recovery` is what follows with `fine_tune`.
    """

    trained: Trained
    pooled_weight: float
    training: Recipe
    recovery: RecoverySettings

    def __post_init__(self) -> None:
        allowed = get_args(Trained)
        require(
            "method.tuning",
            self,
            ("trained", self.trained in allowed, ", ".join(allowed)),
            ("pooled_weight", is_rate(self.pooled_weight), "a number from 0 on"),
        )

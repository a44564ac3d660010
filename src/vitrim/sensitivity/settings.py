"""The choices in predicting losses: what the yaml of a method sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitrim.errors import is_count, is_positive, is_rate, require


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRidges:
    """The ridges of the least-squares problems, relative to the mean variance of their inputs.

    `order` is for ranking units, `fold` for folding removed units into kept ones, `metric` for
    decompositions. `gradient_shrinkage` is the fraction of the products of gradients by different
    outputs that is left out.
    """

    order: float
    fold: float
    metric: float
    gradient_shrinkage: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """How predicted losses are scaled by measured ones; who has it in its settings checks it.

    Args:
        images: on which losses are measured, the first of the calibration images. 0: predictions
            stay as they are.
        shares: fractions of a site's units whose removal is measured, rising; between them the
            scale is interpolated.
    """

    images: int
    shares: Sequence[float]

    def check(self, key: str) -> None:
        """Raise ConfigError if a number means nothing; `key` is that of this in the config."""
        rising = sorted({*self.shares}) == [*self.shares]
        inside = all(is_positive(share) and share < 1 for share in self.shares)
        require(
            key,
            self,
            ("images", self.images == 0 or is_count(self.images), "a whole number from 0 on"),
            ("shares", bool(self.shares) and rising and inside, "rising fractions between 0 and 1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """How a method predicts losses.

    Args:
        temperature: of the decision whose KL divergence is the loss.
        gradient_shrinkage: fraction of the products of gradients by different outputs that is left
            out.
        scaling: of predicted losses by measured ones.
    """

    temperature: float
    gradient_shrinkage: float
    scaling: Scaling

    def __post_init__(self) -> None:
        is_fraction = is_rate(self.gradient_shrinkage) and self.gradient_shrinkage <= 1
        require(
            "method.losses",
            self,
            ("temperature", is_positive(self.temperature), "a number above 0"),
            ("gradient_shrinkage", is_fraction, "a number in 0..1"),
        )
        self.scaling.check("method.losses.scaling")

"""The nested settings of DC-ViT: trials, ridges, and tuning after the cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vitrim.errors import is_positive, is_rate, require
from vitrim.trainer.recipe import Recipe

Tokens = Literal["all", "class"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DCViTRidges:
    """Ridge parameters of least squares, relative to the mean variance of its inputs.

    `order` is for ranking units, `fold` for solving last layers, `closing` for the input of the
    classifier.
    """

    order: float
    fold: float
    closing: float

    def __post_init__(self) -> None:
        require(
            "method.ridges",
            self,
            ("order", is_positive(self.order), "a number above 0"),
            ("fold", is_positive(self.fold), "a number above 0"),
            ("closing", is_positive(self.closing), "a number above 0"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One candidate compressed alone: the share `width` of its units is kept, then it is trained.

    With 0 epochs of `training`, candidates are ranked by least squares alone. All strengths share
    the trials. For the paper's trials, which have the width that the target needs, set that width.
    """

    width: float
    training: Recipe

    def __post_init__(self) -> None:
        fits = is_positive(self.width) and self.width <= 1
        require("method.trial", self, ("width", fits, "a share above 0 and at most 1"))


@dataclass(frozen=True, kw_only=True, slots=True)
class DCViTTuning:
    """Mimicking after the cut: of all tokens, or (`class`) of the classifier's input alone.

    `pooled_weight` is the weight of the error of the classifier's input; that of all tokens has
    weight 1. With `freeze_tail`, the blocks after the neighbour of the last compressed block are
    not trained.
    """

    mimic: Tokens
    pooled_weight: float
    freeze_tail: bool
    training: Recipe

    def __post_init__(self) -> None:
        require(
            "method.tuning",
            self,
            ("mimic", self.mimic in get_args(Tokens), "all or class"),
            ("pooled_weight", is_rate(self.pooled_weight), "a number from 0 on"),
            ("freeze_tail", isinstance(self.freeze_tail, bool), "true or false"),
        )

"""The nested settings of DC-ViT: trials, ridges, and tuning after the cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vitrim.errors import is_positive, is_rate, require
from vitrim.method.dcvit.trial_training import Views
from vitrim.trainer.mimic import FeatureLoss
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.recovery import RecoverySettings

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
    """One candidate compressed alone, then trained.

    The share `width` of its units is kept; all strengths and targets share such trials. With None,
    as in the paper, a candidate keeps as many units as the target leaves it, and the best trial is
    the first step of progressive compression. With 0 epochs of `training`, candidates are ranked
    by least squares alone. `views` are plain images in one order, or, as in the paper, images that
    are augmented (`data.augmentation`) and reshuffled in every epoch.
    """

    width: float | None
    views: Views
    training: Recipe

    def __post_init__(self) -> None:
        width = self.width
        require(
            "method.trial",
            self,
            (
                "width",
                width is None or (is_positive(width) and width <= 1),
                "null or a share above 0 and at most 1",
            ),
            ("views", self.views in get_args(Views), "plain or augmented"),
        )
        self.training.refuse("method.trial.training", "ema_decay", "repeats", "keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class DCViTTuning:
    """Mimicking after the cut: of all tokens, or (`class`) of the classifier's input alone.

    `pooled_weight` is the weight of the error of the classifier's input; that of all tokens has
    weight 1. With `freeze_tail`, the blocks after the neighbour of the last compressed block are
    not trained. `recovery` is what follows with `fine_tune`, of the network as a whole.
    """

    mimic: Tokens
    pooled_weight: float
    freeze_tail: bool
    training: Recipe
    recovery: RecoverySettings

    def __post_init__(self) -> None:
        require(
            "method.tuning",
            self,
            ("mimic", self.mimic in get_args(Tokens), "all or class"),
            ("pooled_weight", is_rate(self.pooled_weight), "a number from 0 on"),
            ("freeze_tail", isinstance(self.freeze_tail, bool), "true or false"),
        )
        self.training.refuse("method.tuning.training", "ema_decay", "repeats")

    @property
    def loss(self) -> FeatureLoss:
        """The loss that is trained, in trials as well."""
        if self.mimic == "class":
            return FeatureLoss(token_weight=0.0, pooled_weight=1.0)
        return FeatureLoss(token_weight=1.0, pooled_weight=self.pooled_weight)

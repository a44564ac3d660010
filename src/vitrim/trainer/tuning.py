"""Training of a compact network as a whole: from few images, or on all training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from vitrim.errors import is_positive, is_rate, require
from vitrim.trainer.classify import Classify
from vitrim.trainer.mimic import Distill, Mimic
from vitrim.trainer.phase import Phase
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.recovery import Recovery, RecoverySettings

Objective = Literal["recovery", "labels", "mimic", "distill"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OneShotTuning:
    """Training after the cut: `recovery` from few images, or training on all training images.

    The latter is with `labels`, to `mimic` features, or to `distill` probabilities. When mimicking,
    `pooled_weight` weighs the error of what the classifier reads against that of all tokens, and
    `logits_weight` an added distillation loss; `temperature` is that of both kinds of distillation.
    """

    objective: Objective
    pooled_weight: float
    logits_weight: float
    temperature: float
    training: Recipe
    recovery: RecoverySettings

    def __post_init__(self) -> None:
        objectives = get_args(Objective)
        require(
            "method.tuning",
            self,
            ("objective", self.objective in objectives, ", ".join(objectives)),
            ("pooled_weight", is_rate(self.pooled_weight), "a number from 0 on"),
            ("logits_weight", is_rate(self.logits_weight), "a number from 0 on"),
            ("temperature", is_positive(self.temperature), "a number above 0"),
        )

    @property
    def labelled_training(self) -> Sequence[Recipe]:
        """The training, if it is with labels."""
        return (self.training,) if self.objective == "labels" else ()

    def phase(self, student: nn.Module, teacher: nn.Module, images: int, n_classes: int) -> Phase:
        """Return the training of `student`; a recovery sees that many images."""
        match self.objective:
            case "recovery":
                return Recovery(student, teacher, settings=self.recovery, images=images)
            case "mimic":
                return Mimic(
                    student,
                    teacher,
                    recipe=self.training,
                    pooled_weight=self.pooled_weight,
                    logits_weight=self.logits_weight,
                    temperature=self.temperature,
                )
            case "distill":
                temperature = self.temperature
                return Distill(student, teacher, recipe=self.training, temperature=temperature)
            case "labels":
                return Classify(student, recipe=self.training, n_classes=n_classes)

"""The choices of joint compression: what conf/method/joint.yaml sets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from vitrim.errors import is_count, is_positive, is_rate, require
from vitrim.sensitivity.settings import LossRidges
from vitrim.trainer.recovery import RecoverySettings

EDITS = ("mlp", "qk", "v", "heads", "ranks", "branches", "int8")
"""What can go: hidden units, directions of queries and keys, of values, heads, components of
layers, whole attentions, MLPs and blocks; and digits of weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JointRidges(LossRidges):
    """The ridges of losses, `regression` for the sequential regression, `closing` for the last.

    That is the regression of the classifier's input.
    """

    regression: float
    closing: float

    def __post_init__(self) -> None:
        rules = [
            (name, is_positive(ridge), "a number above 0")
            for name, ridge in asdict(self).items()
            if name != "gradient_shrinkage"
        ]
        is_fraction = is_rate(self.gradient_shrinkage) and self.gradient_shrinkage <= 1
        require(
            "method.ridges",
            self,
            *rules,
            ("gradient_shrinkage", is_fraction, "a number in 0..1"),
        )

    @property
    def of_losses(self) -> LossRidges:
        """Those of predicting losses."""
        return LossRidges(**{each.name: getattr(self, each.name) for each in fields(LossRidges)})


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalTraining:
    """Training of each MLP by itself, towards the dense stream.

    AdamW with a cosine schedule, on batches of `batch` tokens. The best state of all epochs by the
    error on held-out images is kept, the state before training included. 0 epochs: none.

    Args:
        epochs: passes over the sampled tokens.
        lr: the peak of the learning rate.
        batch: tokens of one step.
        held_out: fraction of the images that are not trained on.
    """

    epochs: int
    lr: float
    batch: int
    held_out: float

    def __post_init__(self) -> None:
        require(
            "method.local",
            self,
            ("epochs", self.epochs == 0 or is_count(self.epochs), "a whole number from 0 on"),
            ("lr", is_positive(self.lr), "a number above 0"),
            ("batch", is_count(self.batch), "a whole number from 1 on"),
            ("held_out", is_positive(self.held_out) and self.held_out < 1, "a number in 0..1"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class JointTuning:
    """Training of the whole network at the end: `recovery`, with `fine_tune`."""

    recovery: RecoverySettings

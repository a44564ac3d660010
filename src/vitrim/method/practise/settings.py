"""The nested settings of PRACTISE: how adaptors are trained."""

from __future__ import annotations

from dataclasses import dataclass

from vitrim.errors import is_count, is_positive, is_rate, require


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptorTraining:
    """SGD on the adaptors of one candidate, with a step-wise decay of the learning rate.

    Args:
        iterations: batches that the adaptors of each candidate are trained on.
        lr: learning rate at the start.
        momentum: of SGD.
        weight_decay: of SGD, on weights and biases.
        decay_every: share of the iterations after which the learning rate is multiplied by `decay`.
        decay: factor on the learning rate.
    """

    iterations: int
    lr: float
    momentum: float
    weight_decay: float
    decay_every: float
    decay: float

    def __post_init__(self) -> None:
        share = "a number above 0 and at most 1"
        require(
            "method.adaptor_training",
            self,
            ("iterations", is_count(self.iterations), "a whole number from 1 on"),
            ("lr", is_positive(self.lr), "a number above 0"),
            ("momentum", is_rate(self.momentum) and self.momentum < 1, "a number in [0, 1)"),
            ("weight_decay", is_rate(self.weight_decay), "a number from 0 on"),
            ("decay_every", is_positive(self.decay_every) and self.decay_every <= 1, share),
            ("decay", is_positive(self.decay) and self.decay <= 1, share),
        )

    def lr_at(self, iteration: int) -> float:
        """Return the learning rate of an iteration, counted from 0.

        >>> sgd = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, "decay": 0.5}
        >>> steps = AdaptorTraining(iterations=5, decay_every=0.4, **sgd)
        >>> [steps.lr_at(iteration) for iteration in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
        """
        period = max(1, int(self.decay_every * self.iterations))
        return self.lr * self.decay ** (iteration // period)

"""Lightning's Trainer over one batch that is on the device, again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from vitrim.trainer.phases import quiet_lightning

from .scale import Scale


class SameBatch:
    """A loader of `n` times one batch: images and labels."""

    def __init__(self, batch: tuple[Tensor, Tensor], n: int) -> None:
        self.batch = batch
        self.n = n
        self.batch_sampler = SimpleNamespace(batch_size=len(batch[0]))

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.n)


def fit(
    scale: Scale,
    phase: LightningModule,
    loader: SameBatch,
    callbacks: Sequence[Callback],
    *,
    epochs: int = 1,
    precision: str = "bf16-mixed",
) -> None:
    """Train a phase on the device, without a logger."""
    with quiet_lightning():
        trainer = Trainer(
            accelerator="cpu" if scale.device == "cpu" else "gpu",
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            max_epochs=epochs,
            callbacks=[*callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=100,
        )
        trainer.fit(phase.train(), loader)

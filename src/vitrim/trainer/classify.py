"""Supervised training and evaluation: the dense net's training and every fine-tuning."""

from __future__ import annotations

import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy

from vitrim.trainer.distillation import Distillation
from vitrim.trainer.phase import ResumePoint
from vitrim.trainer.recipe import Recipe, adamw_cosine


class Classify(LightningModule):
    """Cross-entropy on class indices (B,) or soft labels (B, classes); top-k in percent."""

    calibration_images = None
    resumes_at: ResumePoint = "batch"
    trains = True
    best_by = "top1"

    def __init__(self, net: nn.Module, *, recipe: Recipe, n_classes: int) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self.epochs = recipe.epochs
        self.clip_norm = recipe.clip_norm
        self.accuracy = MetricCollection(
            {
                f"top{k}": MulticlassAccuracy(n_classes, top_k=min(k, n_classes), average="micro")
                for k in (1, 5)
            }
        )
        self.images = SumMetric()
        self.n_evaluated = 0
        self._distillation: Distillation | None = None

    def learn_from(self, distillation: Distillation | None) -> None:
        """Learn from a teacher as well as from the labels; None: from the labels alone."""
        self._distillation = distillation

    @property
    def networks(self) -> list[nn.Module]:
        """The network, and a teacher."""
        return [self.net, *([self._distillation.teacher] if self._distillation else [])]

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Return the logits."""
        return [self.net(images)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of one batch: images (B, C, H, W) and targets."""
        images, targets = batch
        logits = self.net(images)
        loss = F.cross_entropy(logits, targets)
        if self._distillation is not None:
            loss = self._distillation.loss(images, logits, loss)
        self.log("loss", loss)
        return loss

    def on_validation_start(self) -> None:
        """Evaluate in eval mode, whatever mode the net came in."""
        self.net.eval()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Count the hits of one batch."""
        images, labels = batch
        self.accuracy.update(self.net(images), labels)
        self.images.update(len(labels))

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies over all samples, in percent; return to training mode if training."""
        hits: dict[str, Tensor] = self.accuracy.compute()
        percent = {name: 100 * share for name, share in hits.items()}
        self.log_dict(percent, prog_bar=True, sync_dist=True)  # equal in every process
        self.accuracy.reset()
        self.n_evaluated = round(float(self.images.compute()))
        self.images.reset()
        self.net.train(self.trainer.training)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the cosine schedule of the recipe."""
        return adamw_cosine(self.net, self.recipe, self.trainer)


def log_hits(phase: LightningModule, logits: Tensor, labels: Tensor) -> None:
    """Log top-1 and top-5 of a batch of a validation, in percent.

    They become means over the images of all processes.

    Args:
        phase: in its `validation_step`.
        logits: (B, classes).
        labels: (B,).
    """
    hits = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
    metrics = {f"top{k}": 100 * hits[:, :k].any(-1).float().mean() for k in (1, 5)}
    phase.log_dict(metrics, prog_bar=True, on_epoch=True, sync_dist=True, batch_size=len(labels))


def validate(
    net: nn.Module, trainer: Trainer, data: LightningDataModule, *, n_classes: int
) -> dict[str, float]:
    """Return top-1 and top-5 of `net` in percent over the validation set of `data`.

    `images` is how many images were evaluated: fewer than the set has where the trainer limits the
    batches.
    """
    recipe = Recipe(epochs=0, lr=0.0, weight_decay=0.0, warmup_epochs=0.0, clip_norm=0.0)
    classify = Classify(net, recipe=recipe, n_classes=n_classes)
    (metrics,) = trainer.validate(classify, datamodule=data, verbose=False)
    return {"top1": metrics["top1"], "top5": metrics["top5"], "images": classify.n_evaluated}

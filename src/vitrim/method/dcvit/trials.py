"""Trials of dense compression: how well the network does with one candidate compressed alone.

A trial (DC-ViT, arXiv 2403.18708, Algorithm 1) takes the attention out of a block, or of each of a
group of successive blocks, and most units out of its MLP, compensates what it can, and scores the
distance of the network to the dense one on the judging set. Beyond the paper, units are ranked by
their values without the attention, and the last layer is first solved by least squares towards what
the whole block did. Both come from one pass over the images, for all blocks at once; with 0 epochs
of training that pass is all. In a convolutional network the whole block is removed, and only
training compensates. Trials that are trained are shared out among the processes of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.budget.blocks import Group, flatten, hidden_of, whole_blocks
from vitrim.method.dcvit.compression import Compression, compressed, last_layers
from vitrim.method.dcvit.evaluation import Distance, JudgingSet, evaluate_in_order
from vitrim.method.dcvit.mlp_statistics import CompressedMLP, MLPStatistics
from vitrim.method.dcvit.rounds import Rounds
from vitrim.method.dcvit.synthetic import SyntheticImages
from vitrim.method.dcvit.trial_training import (
    Targets,
    TrialRecipe,
    TrialState,
    TrialTraining,
    trained_vector,
)
from vitrim.network import stream, structure
from vitrim.plan import Evidence
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.mimic import frozen_parameters
from vitrim.trainer.phase import AugmentedImages, ResumePoint
from vitrim.trainer.resume import size_buffers


class Trials(LightningModule):
    """Gather what all candidates' MLPs need, then try each candidate and score it (high: keep it).

    Evidence has `scores` of the units by hidden site, `block_scores` by the first block of each
    candidate, and as `moments` what `MLPStatistics` gathers: as much of it as the compression
    reads. `synthetic` has the images of the judging set, if it is synthetic.

    Trials are trained on the calibration images towards the features that the dense network has for
    them: on plain images in their order, or on augmented views of them. `best_trial` has what was
    trained in the trial with the lowest score: its parameters and the statistics of its BatchNorms.

    Args:
        net: the dense network, which is not changed; copies of it are compressed and trained.
        groups: the candidates.
        sampling: the images, and which of their tokens.
        compression: how a candidate is compressed.
        recipe: how it is trained.
        synthetic: how the judging set is made; None: it is the calibration images.
        distance: of a trial to the dense network.
    """

    resumes_at: ResumePoint = "epoch"
    clip_norm = 0.0  # trials clip their own gradients
    trains = True
    group_scores: Tensor
    synthetic_images: Tensor
    best_parameters: Tensor
    best_position: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        groups: Sequence[Group],
        sampling: Sampling,
        compression: Compression,
        recipe: TrialRecipe,
        synthetic: SyntheticImages | None,
        distance: Distance,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        described = structure(net)
        branches, ends = whole_blocks(described), last_layers(described)
        blocks = {block: branches[block] for block in flatten(groups) if block in branches}
        self.net = net
        self.groups = list(groups)
        self.blocks = blocks
        self.hidden = {block: hidden_of(described, mlp) for block, (_, mlp) in blocks.items()}
        self.compression = compression
        self.recipe = recipe
        self.rounds = Rounds.here(len(groups), recipe.training.epochs)
        self.epochs = self.rounds.n_epochs
        self.own_steps = recipe.training.epochs > 0
        n, augments = sampling.images, self.own_steps and recipe.views == "augmented"
        self.calibration_images = AugmentedImages(images=n) if augments else n
        self.settings: dict[str, object] = {
            "groups": ["+".join(group) for group in groups],
            "sampling": asdict(sampling),
            "compression": compression.settings,
            "recipe": recipe.settings(),
            "synthetic": synthetic and asdict(synthetic),
            "distance": distance,
        }
        self._stream = stream(net) if blocks else None
        self._ends = {block: ends[block] for block in blocks}
        mlps = [CompressedMLP(*blocks[block], end) for block, end in self._ends.items()]
        self.statistics = MLPStatistics(net, mlps, compression.gathered, sampling)
        for name in ("group_scores", "synthetic_images", "best_parameters", "best_position"):
            self.register_buffer(name, torch.empty(0))
        self._unit_scores: dict[str, Tensor] = {}
        self._judging_set = JudgingSet(synthetic, distance, seed=compression.seed)
        self._targets = Targets(net, recipe.views)
        self._trial: TrialTraining | None = None
        self._interrupted: TrialState | None = None

    def on_train_start(self) -> None:
        """Set the network to eval mode, in which it is used."""
        self.net.eval()

    def configure_optimizers(self) -> None:
        """Return none: every trial has an optimiser of its own."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Gather statistics of a batch of images (B, C, H, W) in the first epoch; then train."""
        images = batch[0]
        if self.current_epoch == 0:
            self._judging_set.add(images)
            self.statistics.add(self.net, images)
            if self.recipe.training.epochs:
                self._targets.keep(images)
            return
        if self.rounds.at(self.current_epoch)[0] is None:
            return
        assert self._trial is not None
        if self._targets.lacks(batch_index):  # this process began after the first epoch
            self._targets.keep(images)
            self._judging_set.add(images)
        loss = self._trial.step(images, self._targets.of(images, batch_index), self.manual_backward)
        self.log("loss", loss)

    def on_train_epoch_start(self) -> None:
        """Begin the next trial, or continue the one that was interrupted."""
        interrupted, self._interrupted = self._interrupted, None
        self.rounds.place(self.trainer.train_dataloader, self.current_epoch)
        position, epoch = self.rounds.at(self.current_epoch)
        if position is None:
            return
        n_batches = int(self.trainer.num_training_batches)
        if self.recipe.views == "augmented":
            self._judging_set.add_missing(self.trainer.train_dataloader, n_batches, self.device)
        if epoch and interrupted is None:
            return
        group, recipe = self.groups[position], self.recipe.scaled_to(self.trainer)
        net = self._compressed(group)
        frozen = frozen_parameters(net, group, freeze_tail=recipe.freeze_tail, dense=self.net)
        steps = n_batches * recipe.training.epochs
        self._trial = TrialTraining(net, self.net, recipe, frozen=frozen, steps=steps)
        if interrupted is not None:
            self._trial.load_state_dict(interrupted)

    def on_train_epoch_end(self) -> None:
        """Finish the statistics after the first epoch; score a trial that has ended."""
        if self.current_epoch == 0:
            self._finish_statistics()
            return
        position, epoch = self.rounds.at(self.current_epoch)
        if epoch + 1 == self.recipe.training.epochs:
            trial, self._trial = self._trial, None
            self._score(position, trial)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the trial in training, and omit the dense network, which does not change."""
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {k: v for k, v in state if not k.startswith("net.")}
        checkpoint["trial"] = self.rounds.gathered(self._trial)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give buffers the size of what was gathered, and keep the trial that was in training."""
        state = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        checkpoint["state_dict"] = state | checkpoint["state_dict"]
        size_buffers(self, checkpoint["state_dict"])
        self._interrupted = self.rounds.own(checkpoint["trial"])

    def _finish_statistics(self) -> None:
        """Bring sums into their final form; make the judging set; score what is not trained."""
        self.statistics.finish()
        synthetic = self._judging_set.synthesise(self.net.eval())
        self.synthetic_images = self.rounds.sent(synthetic, 0, self.device)
        self.group_scores = torch.zeros(len(self.groups), device=self.device)
        if self.recipe.training.epochs:
            return
        # trials by least squares alone: up to its first block, each is as `net`
        nets = (self._compressed(group) for group in self.groups)
        evaluation = self._judging_set.evaluation(self.net, self.synthetic_images)
        distances: Iterable[Tensor] = map(evaluation.of_network, nets)
        if self._stream is not None and self._stream.norm_is_features:
            attentions = [self.blocks[group[0]][0] for group in self.groups]
            distances = evaluate_in_order(evaluation, self._stream, attentions, nets)
        for position, distance in enumerate(distances):
            self.group_scores[position] = distance

    def _score(self, position: int | None, trial: TrialTraining | None) -> None:
        """Score a round of trials, of which this process may have none; keep the best so far."""
        scores = torch.zeros_like(self.group_scores)
        if position is not None and trial is not None:
            evaluation = self._judging_set.evaluation(self.net, self.synthetic_images)
            scores[position] = evaluation.of_network(trial.net)
        self.group_scores = self.group_scores + self.rounds.summed(scores)
        tried = self.rounds.tried(self.current_epoch)
        best = int(self.group_scores[: tried.stop].argmin())
        if best in tried:
            trained = None if trial is None or best != position else trained_vector(trial.net)
            self.best_parameters = self.rounds.sent(trained, best, self.device)
            self.best_position = torch.tensor(best)

    def _compressed(self, group: Group) -> nn.Module:
        """Return the network with one group compressed."""
        return compressed(self.net, group, self.evidence(), self.compression, self._ends)

    def evidence(self) -> Evidence:
        """Return scores and moments; empty where no image was seen."""
        if not self.group_scores.numel():
            return Evidence()
        moments = self.statistics.tensors()
        if not self._unit_scores:
            ends = {self.hidden[block]: end for block, end in self._ends.items()}
            self._unit_scores = self.compression.rank_all(self.net, ends, moments)
        blocks = [group[0] for group in self.groups]
        best: tuple[str, Tensor] | None = None
        if self.best_parameters.numel():
            best = blocks[int(self.best_position)], self.best_parameters
        return Evidence(
            scores=dict(self._unit_scores),
            moments=moments,
            block_scores=dict(zip(blocks, self.group_scores.tolist(), strict=True)),
            synthetic=self.synthetic_images if self.synthetic_images.numel() else None,
            best_trial=best,
        )

"""Trials of dense compression: how well the network does with one candidate compressed alone.

A trial (DC-ViT, arXiv 2403.18708, Algorithm 1) takes the attention out of a block, or of each of a
group of successive blocks, and most units out of its MLP, compensates what it can, and scores the
distance of the network to the dense one on the judging set. Beyond the paper, units are ranked by
their values without the attention, and the last layer is first solved by least squares towards what
the whole block did. Both come from one pass over the images, for all blocks at once; with 0 epochs
of training that pass is all. In a convolutional network the whole block is removed, and only
training compensates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.budget.blocks import Group, flatten, hidden_of, whole_blocks
from vitrim.method.dcvit.compression import Compression, compressed, last_layers
from vitrim.method.dcvit.evaluation import Distance, JudgingSet, evaluate_in_order, features_of
from vitrim.method.dcvit.mlp_statistics import MLPStatistics
from vitrim.method.dcvit.synthetic import SyntheticImages
from vitrim.method.dcvit.trial_training import TrialState, TrialTraining, trained_tensors
from vitrim.network import structure
from vitrim.plan import Evidence
from vitrim.trainer.calibrate import Calibrate, Sampling, gather_tokens
from vitrim.trainer.mimic import frozen_parameters
from vitrim.trainer.phase import ResumePoint
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.resume import size_buffers


class Trials(Calibrate):
    """Calibrate all candidates' blocks, then try each candidate and score it (high: keep it).

    Evidence has, in addition to what `Calibrate` gathers for the candidates' MLPs, `scores` of the
    units by hidden site, `block_scores` by the first block of each candidate, and `moments` by MLP:
    `trial.mean` and `trial.cov`, (M + D,), of its units without the attention and of what the whole
    block adds to the stream. `synthetic` has the images of the judging set, if it is synthetic.

    Trials are trained on the calibration images, in their order, towards the features that the
    dense network had for them in the first epoch. `best_trial` has what was trained in the trial
    with the lowest score: its parameters and the statistics of its BatchNorms.

    Args:
        net: the dense network, which is not changed; copies of it are compressed and trained.
        groups: the candidates.
        sampling: the images, and which of their tokens.
        compression: how a candidate is compressed.
        recipe: how it is trained.
        freeze_tail: whether the blocks after the neighbour of its last block are not trained.
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
        recipe: Recipe,
        freeze_tail: bool,
        synthetic: SyntheticImages | None,
        distance: Distance,
    ) -> None:
        described = structure(net)
        branches, ends = whole_blocks(described), last_layers(described)
        blocks = {block: branches[block] for block in flatten(groups) if block in branches}
        hidden = {block: hidden_of(described, mlp) for block, (_, mlp) in blocks.items()}
        sites = list(hidden.values())
        super().__init__(net, sites=sites, sampling=sampling, taylor=False, targets=bool(blocks))
        self.groups = list(groups)
        self.blocks = blocks
        self.hidden = hidden
        self.compression = compression
        self.trial_recipe = recipe
        self.freeze_tail = freeze_tail
        self.epochs = 1 + len(groups) * recipe.epochs
        self.settings |= {
            "groups": ["+".join(group) for group in groups],
            "compression": asdict(compression),
            "recipe": asdict(recipe),
            "freeze_tail": freeze_tail,
            "synthetic": synthetic and asdict(synthetic),
            "distance": distance,
        }
        self._ends = {block: ends[block] for block in blocks}
        self._mlps = MLPStatistics(net, self._ends.values())
        for name in ("group_scores", "synthetic_images", "best_parameters", "best_position"):
            self.register_buffer(name, torch.empty(0))
        self._unit_scores: dict[str, Tensor] = {}
        self._judging_set = JudgingSet(synthetic, distance)
        self._references: list[Tensor] = []
        self._trial: TrialTraining | None = None
        self._interrupted: TrialState | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Gather statistics of a batch of images (B, C, H, W) in the first epoch; then train."""
        images = batch[0]
        if self.current_epoch == 0:
            self._judging_set.add(images)
            if self.blocks:
                super().training_step(batch, batch_index)
            if self.trial_recipe.epochs:
                self._references.append(features_of(self.net, images))
            return
        if batch_index == len(self._references):  # this process began after the first epoch
            self._references.append(features_of(self.net, images))
            self._judging_set.add(images)
        assert self._trial is not None
        loss = self._trial.step(images, self._references[batch_index], self.manual_backward)
        self.log("loss", loss, prog_bar=True)

    def on_train_epoch_start(self) -> None:
        """Begin the next trial, or continue the one that was interrupted."""
        interrupted, self._interrupted = self._interrupted, None
        if self.current_epoch == 0:
            return
        position, epoch = divmod(self.current_epoch - 1, self.trial_recipe.epochs)
        if epoch and interrupted is None:
            return
        group, recipe = self.groups[position], self.trial_recipe
        net = self._compressed(group)
        frozen = frozen_parameters(net, group, freeze_tail=self.freeze_tail, dense=self.net)
        steps = int(self.trainer.num_training_batches) * recipe.epochs
        self._trial = TrialTraining(net, recipe, frozen=frozen, steps=steps)
        if interrupted is not None:
            self._trial.load_state_dict(interrupted)

    def on_train_epoch_end(self) -> None:
        """Finish the statistics after the first epoch; score a trial that has ended."""
        if self.current_epoch == 0:
            self._finish_statistics()
            return
        position, epoch = divmod(self.current_epoch, self.trial_recipe.epochs)
        if epoch == 0:
            assert self._trial is not None
            net, self._trial = self._trial.net, None
            self._score(position - 1, net)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the trial in training."""
        checkpoint["trial"] = None if self._trial is None else self._trial.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give buffers the size of what was gathered, and keep the trial that was in training."""
        size_buffers(self, checkpoint["state_dict"])
        self._interrupted = checkpoint["trial"]

    def _take_in(self, activations: Mapping[str, Tensor]) -> None:
        super()._take_in(activations)
        for block, (attention, mlp) in self.blocks.items():
            branch = self._branches[mlp]
            before = activations[self._branches[attention].reader]
            after = activations[self._stream.reader_after(branch)]
            index, weights = self._sampled(after)
            streams = gather_tokens(before, index), gather_tokens(after, index)
            self._mlps.add(self.net, branch, self._ends[block], streams, weights)

    def _finish_statistics(self) -> None:
        """Bring sums into their final form; make the judging set; score what is not trained."""
        super().on_train_end()
        self._mlps.finish()
        self.synthetic_images = self._judging_set.synthesise(self.net.eval())
        self.group_scores = torch.zeros(len(self.groups), device=self.device)
        if not self.trial_recipe.epochs:
            self._score_all()

    def _score_all(self) -> None:
        """Score the trials by least squares alone: up to its first block, each is as `net`."""
        nets = (self._compressed(group) for group in self.groups)
        evaluation = self._judging_set.evaluation(self.net, self.synthetic_images)
        distances: Iterable[Tensor] = map(evaluation.of_network, nets)
        if self.blocks and self._stream.norm_is_features:
            attentions = [self.blocks[group[0]][0] for group in self.groups]
            distances = evaluate_in_order(evaluation, self._stream, attentions, nets)
        for position, distance in enumerate(distances):
            self.group_scores[position] = distance

    def _score(self, position: int, net: nn.Module) -> None:
        """Score a trained trial, and keep what was trained if it is the best so far."""
        evaluation = self._judging_set.evaluation(self.net, self.synthetic_images)
        self.group_scores[position] = evaluation.of_network(net)
        if position == int(self.group_scores[: position + 1].argmin()):
            self.best_parameters = torch.cat([tensor.flatten() for tensor in trained_tensors(net)])
            self.best_position = torch.tensor(position)

    def _compressed(self, group: Group) -> nn.Module:
        """Return the network with one group compressed."""
        return compressed(self.net, group, self.evidence(), self.compression, self._ends)

    def evidence(self) -> Evidence:
        """Return scores and moments; empty where no image was seen."""
        if not self.group_scores.numel():
            return Evidence()
        moments = {name: dict(tensors) for name, tensors in super().evidence().moments.items()}
        scores = {}
        for position, (block, end) in enumerate(self._ends.items()):
            statistics = self._mlps.tensors(end)
            moments[end] |= {f"trial.{name}": tensor for name, tensor in statistics.items()}
            if end not in self._unit_scores:
                weight = self.net.get_submodule(end).get_parameter("weight")
                self._unit_scores[end] = self.compression.rank(statistics, weight, position)
            scores[self.hidden[block]] = self._unit_scores[end]
        blocks = [group[0] for group in self.groups]
        best: tuple[str, Tensor] | None = None
        if self.best_parameters.numel():
            best = blocks[int(self.best_position)], self.best_parameters
        return Evidence(
            scores=scores,
            moments=moments,
            block_scores=dict(zip(blocks, self.group_scores.tolist(), strict=True)),
            synthetic=self.synthetic_images if self.synthetic_images.numel() else None,
            best_trial=best,
        )

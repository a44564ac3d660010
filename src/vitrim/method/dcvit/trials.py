"""Trials of dense compression: how well the network does with one candidate compressed by itself.

A trial (DC-ViT, arXiv 2403.18708, Algorithm 1) takes the attention out of a block, or of each of a
group of successive blocks, and most units out of its MLP, mends what it can, and scores what the
network then says of the metric set. Beyond the paper, units are ranked on what they are without the
attention, and the last layer is first solved by least squares towards what the whole block did;
both come from one pass over the images, for all blocks at once, and with `epochs` 0 that is all.
In a convolutional network the whole block is taken out, and nothing is mended but by training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.budget.blocks import Group, hidden_of, whole_blocks
from vitrim.closed_form.importance import surgeon
from vitrim.closed_form.moments import Moments, key_of
from vitrim.closed_form.reconstruction import fitted
from vitrim.method.dcvit.synthetic import METRIC_SET, Dream
from vitrim.network import stream, structure
from vitrim.network.stream import Branch
from vitrim.network.surgery import cut
from vitrim.plan import BLOCKS, Drop, Evidence, Keep, Plan
from vitrim.trainer.calibrate import Calibrate, Sampling, take, watch
from vitrim.trainer.mimic import frozen
from vitrim.trainer.recipe import Recipe, optimisation
from vitrim.trainer.resume import size_buffers

Reuse = Literal["surgeon", "activation", "random", "none"]
Distance = Literal["kl", "mse"]
CANDIDATE = "candidate"


class Trials(Calibrate):
    """Calibrate all candidates' blocks, then try each candidate, and score it (high: hard to lose).

    Evidence has, beside what `Calibrate` finds for the candidates' MLPs, `scores` by hidden site
    (by block where that goes whole) and, under "blocks", one a candidate in their order; `moments`
    of "metric_set", if it was dreamt up, its images (n, C, H, W) with their classes, and, by MLP,
    `trial.mean` and `trial.cov` of its units without the attention and of what the whole block adds
    to the stream, (M + D,).

    Trials that train do so on the calibration images, in their order, towards the features that the
    dense network had for them in the first epoch. Of the best one the parameters are kept, and what
    its norms have counted, one after another, (n,), under "candidate", with the place of its group.
    """

    resumes_at = "epoch"

    def __init__(
        self,
        net: nn.Module,
        *,
        groups: Sequence[Group],
        sampling: Sampling,
        reuse: Reuse,
        regression: bool,
        ridges: tuple[float, float],
        width: float,
        recipe: Recipe,
        front: bool,
        metric_set: Dream | None,
        distance: Distance,
        seed: int,
    ) -> None:
        described = structure(net)
        whole = whole_blocks(described)
        blocks = {block: whole[block] for group in groups for block in group if block in whole}
        self.hidden = {block: hidden_of(described, mlp) for block, (_, mlp) in blocks.items()}
        super().__init__(
            net,
            sites=list(self.hidden.values()),
            sampling=sampling,
            taylor=False,
            targets=bool(blocks),
        )
        self.groups = list(groups)
        self.blocks = blocks
        self.reuse = reuse
        self.regression = regression
        self.order_ridge, self.fold_ridge = ridges
        self.width = width
        self.recipe_of_trials = recipe
        self.front = front
        self.metric_set = metric_set
        self.distance = distance
        self.seed = seed
        self.epochs = 1 + len(groups) * recipe.epochs
        self.settings |= {
            "blocks": ["+".join(group) for group in groups],
            "reuse": reuse,
            "regression": regression,
            "ridges": list(ridges),
            "width": width,
            "recipe": asdict(recipe),
            "front": front,
            "metric_set": metric_set and asdict(metric_set),
            "distance": distance,
            "seed": seed,
        }
        ends = {branch.name: branch.ends[0] for branch in described.branches}
        self._ends = {block: ends[mlp] for block, (_, mlp) in blocks.items()}
        self._alone = nn.ModuleDict()
        for end in self._ends.values():
            rows, columns = net.get_submodule(end).get_parameter("weight").shape
            self._alone[key_of(end)] = Moments(end, rows + columns)
        for name in ("scores", METRIC_SET, "labels", CANDIDATE, "place"):
            self.register_buffer(f"_{name}", torch.empty(0))
        self._order: dict[str, Tensor] = {}
        self._trial: list[nn.Module] = []  # in a list: not saved with this module
        self._begun: dict[str, Any] | None = None
        self._images: list[Tensor] = []
        self._judged: list[Tensor] = []
        self._wanted: list[Tensor] = []
        self._aims: list[Tensor] = []

    def training_step(self, batch: Any, batch_index: int) -> None:
        """Look at a batch of images (B, C, H, W) in the first epoch, then train on it."""
        if self.current_epoch == 0:
            if self.metric_set is None or not self._images:
                self._images.append(batch[0])
            self._bound(batch[0])
            if self.blocks:
                super().training_step(batch, batch_index)
            if self.recipe_of_trials.epochs:
                self._aim(batch[0])
        else:
            if batch_index == len(self._aims):  # this process began after the first epoch
                self._aim(batch[0])
                if self.metric_set is None:
                    self._judged.append(batch[0])
            self._train(batch[0], batch_index)

    @torch.no_grad()
    def _aim(self, images: Tensor) -> None:
        """Note the dense network's features of a batch, for the trials to come."""
        self._aims.append(self.net.forward_features(images))  # type: ignore[operator]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the trial that is under way."""
        checkpoint["trial"] = self._trial and {
            "net": self._trial[0].state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for what was gathered, and note the trial that was under way."""
        size_buffers(self, checkpoint["state_dict"])
        self._begun = checkpoint["trial"] or None

    def _bound(self, images: Tensor) -> None:
        """Note how dark and how bright pixels get."""
        low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
        known = getattr(self, "_range", (low, high))
        self._range = (torch.minimum(low, known[0]), torch.maximum(high, known[1]))

    def _take_in(self, flows: Mapping[str, Tensor]) -> None:
        super()._take_in(flows)
        for block, (attention, mlp) in self.blocks.items():
            branch = self._branches[mlp]
            x = flows[self._branches[attention].before]
            y = flows[self._stream.following(branch)]
            index, weights = self._sampled(y)
            x, y = take(x, index), take(y, index)
            end = self._ends[block]
            with watch(self.net, [(end, False)]) as inner:
                branch.apply(x)
            off = branch.unscaled(y - x)
            rows = torch.cat([branch.tokens(inner[end]), off], dim=-1)
            self._moments_alone(end).add(rows.flatten(0, 1), weights.flatten())

    def _moments_alone(self, end: str) -> Moments:
        found = self._alone[key_of(end)]
        assert isinstance(found, Moments)
        return found

    def on_train_epoch_end(self) -> None:
        """Bring statistics into their final form, once; score the trial that has ended."""
        each, epoch = self.recipe_of_trials.epochs, self.current_epoch
        if epoch == 0:
            self._conclude()
        elif epoch % each == 0:
            at, trial = epoch // each - 1, self._trial.pop()
            self._judge(at, trial)
            if at == int(self._scores[: at + 1].argmin()):
                self._candidate = torch.cat([tensor.flatten() for tensor in learnt(trial)])
                self._place = torch.tensor(at)

    def on_train_epoch_start(self) -> None:
        """Begin the next trial."""
        each, epoch = self.recipe_of_trials.epochs, self.current_epoch
        if epoch and (epoch - 1) % each == 0:
            self._begin((epoch - 1) // each)
        elif epoch and self._begun is not None:
            self._begin((epoch - 1) // each)
            self._trial[0].load_state_dict(self._begun["net"])
            self._optimizer.load_state_dict(self._begun["optimizer"])
            self._schedule.load_state_dict(self._begun["schedule"])
        self._begun = None

    @torch.no_grad()
    def _conclude(self) -> None:
        super().on_train_end()
        for moments in self._alone.values():
            assert isinstance(moments, Moments)
            moments.finish()
        net = self.net.eval()
        logits = net(self._images[0])
        low, high = self._range
        self._judged = self._images
        if self.metric_set is not None:
            with torch.enable_grad():
                self._metric_set, self._labels = self.metric_set.run(
                    net,
                    n_classes=logits.shape[1],
                    low=low,
                    high=high,
                    size=self._images[0].shape[2:],  # type: ignore[arg-type]
                )
        self._scores = torch.zeros(len(self.groups), device=low.device)
        if not self.recipe_of_trials.epochs:
            self._judge_all()
        self._images = []

    @torch.no_grad()
    def _judge_all(self) -> None:
        """Score the trials by least squares; up to its first block, each is the dense network.

        That part is run once for all of them, and its stream, held in memory meanwhile: images x
        tokens x D numbers.
        """
        if not self.blocks or not self._stream.alone:
            for at, group in enumerate(self.groups):
                self._judge(at, self._compressed(group))
            return
        places = {
            branch.name: at
            for at, branch in enumerate(self._stream.steps)
            if isinstance(branch, Branch)
        }
        streams, run = [self._stream.embed(x) for x in self._metric_images()], 0
        for at, group in enumerate(self.groups):
            first = places[self.blocks[group[0]][0]]
            for step in self._stream.steps[run:first]:
                streams = [step.advance(x) for x in streams]
            run = first
            self._judge(at, self._compressed(group), begun=(first, streams))

    def _compressed(self, group: Group) -> nn.Module:
        """Return the network with one group compressed, its last layers solved if asked for."""
        evidence = self.evidence()
        plan = plan_of_trial(self.net, group, evidence, self.width)
        net = cut(self.net, plan)
        values = self.values(net, plan, evidence)
        with torch.no_grad():
            for name, value in values.items():
                net.get_parameter(name).copy_(value)
        return net.eval()

    def values(self, net: nn.Module, plan: Plan, evidence: Evidence) -> dict[str, Tensor]:
        """Return what the solved last layers of compressed blocks are in `net`, by name."""
        return solved(net, plan, evidence, self._ends, self.fold_ridge) if self.regression else {}

    def _metric_images(self) -> list[Tensor]:
        """Return the batches of images that trials are judged on."""
        return self._judged if self.metric_set is None else [*torch.split(self._metric_set, 50)]

    @torch.no_grad()
    def _judge(
        self, at: int, net: nn.Module, *, begun: tuple[int, list[Tensor]] | None = None
    ) -> None:
        """Score a trial on the metric set, or from a step of the stream on, its streams given."""
        judged = self._metric_images()
        if not self._wanted:
            dense = self.net.eval()
            self._wanted = [self._said(dense, dense.forward_features(x)) for x in judged]  # type: ignore[operator]
        net.eval()
        total = torch.zeros((), dtype=torch.float64)
        for place, wanted in enumerate(self._wanted):
            if begun is None:
                features = net.forward_features(judged[place])  # type: ignore[operator]
            else:
                features = stream(net).features(net, begun[1][place], begun[0])
            found = self._said(net, features)
            if self.distance == "kl":
                total += F.kl_div(found, wanted, log_target=True, reduction="sum").cpu()
            else:
                total += len(found) * F.mse_loss(found, wanted).cpu()
        self._scores[at] = total / sum(map(len, judged))

    def _said(self, net: nn.Module, features: Tensor) -> Tensor:
        """Return what trials are judged by: log-probabilities (B, classes), or features."""
        if self.distance == "kl":
            logits: Tensor = net.forward_head(features)  # type: ignore[operator]
            return logits.log_softmax(-1)
        return features

    def _begin(self, at: int) -> None:
        group = self.groups[at]
        trial = self._compressed(group).train()
        fixed = frozen(trial, group, front=self.front, dense=self.net)
        for name, parameter in trial.named_parameters():
            parameter.requires_grad_(name not in fixed)
        self._trial = [trial]
        batches = int(self.trainer.num_training_batches)
        made = optimisation(
            trial, self.recipe_of_trials, steps=batches * self.recipe_of_trials.epochs
        )
        self._optimizer, self._schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]

    def _train(self, images: Tensor, batch_index: int) -> None:
        (trial,) = self._trial
        clip = self.recipe_of_trials.clip_norm
        loss = step(
            trial, images, self._aims[batch_index], self._optimizer, clip, self.manual_backward
        )
        self._schedule.step()
        self.log("loss", loss, prog_bar=True)

    def evidence(self) -> Evidence:
        """Return scores and moments; empty where no image was seen."""
        if not self._scores.numel():
            return Evidence(scores={})
        found = super().evidence()
        moments = {name: dict(tensors) for name, tensors in found.moments.items()}
        scores = {}
        for block, end in self._ends.items():
            alone = self._moments_alone(end).tensors()
            moments[end] |= {f"trial.{name}": tensor for name, tensor in alone.items()}
            if end not in self._order:
                self._order[end] = self._ranked(end, alone)
            scores[self.hidden[block]] = self._order[end]
        if not self.blocks:
            scores = {block: self._scores[at : at + 1] for at, (block,) in enumerate(self.groups)}
        scores[BLOCKS] = self._scores
        if self._metric_set.numel():
            moments[METRIC_SET] = {"images": self._metric_set, "labels": self._labels}
        if self._candidate.numel():
            moments[CANDIDATE] = {"parameters": self._candidate, "place": self._place}
        return Evidence(scores=scores, moments=moments)

    def _ranked(self, end: str, alone: Mapping[str, Tensor]) -> Tensor:
        """Return how much each unit of the MLP that ends in `end` matters, (M,)."""
        weight = self.net.get_submodule(end).get_parameter("weight").detach()
        units = weight.shape[1]
        match self.reuse:
            case "surgeon":
                cov = alone["cov"][:units, :units]
                return surgeon(cov, weight.T.cpu(), ridge=self.order_ridge)
            case "activation":
                return alone["mean"][:units].clone()
            case _:
                place = [*self._ends.values()].index(end)
                generator = torch.Generator().manual_seed(self.seed + place)
                return torch.rand(units, generator=generator)


@torch.enable_grad()
def step(
    net: nn.Module,
    images: Tensor,
    aim: Tensor,
    optimizer: torch.optim.Optimizer,
    clip: float,
    backward: Callable[[Tensor], Any],
) -> Tensor:
    """Train `net` on one batch (B, C, H, W) towards features (B, N, D); return the loss, eq. 3.

    Nothing is computed for parameters that need no gradient.
    """
    features = net.forward_features(images)  # type: ignore[operator]
    loss = F.mse_loss(features, aim)
    optimizer.zero_grad()
    backward(loss)
    if clip:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()
    return loss.detach()


def plan_of_trial(net: nn.Module, group: Group, evidence: Evidence, width: float) -> Plan:
    """Return the plan of one trial: attentions go, the share `width` of the units stays.

    A block without an attention goes whole.
    """
    described = structure(net)
    branches = whole_blocks(described)
    edits: list[Drop | Keep] = [Drop(branch=block) for block in group if block not in branches]
    for attention, mlp in (branches[block] for block in group if block in branches):
        site = hidden_of(described, mlp)
        size = described.sites[site].size
        keep = best_of(evidence.scores[site], max(1, round(width * size)))
        edits.append(Drop(branch=attention))
        if len(keep) < size:
            edits.append(Keep(site=site, index=keep))
    return Plan(model={}, edits=tuple(edits))


def learnt(net: nn.Module) -> list[Tensor]:
    """Return what training changes in `net`: its parameters, and what its norms count."""
    counted = (t for name, t in net.named_buffers() if ".running_" in name)
    return [tensor.detach() for tensor in (*net.parameters(), *counted)]


def best_of(scores: Tensor, n: int) -> tuple[int, ...]:
    """Return the `n` units with the highest scores, ascending; ties go to the lower index."""
    order = (-scores.double()).argsort(stable=True)[:n]
    return tuple(order.sort().values.tolist())


def solved(
    net: nn.Module, plan: Plan, evidence: Evidence, ends: Mapping[str, str], ridge: float
) -> dict[str, Tensor]:
    """Return weight and bias of the compressed blocks' last layers, towards what the blocks did.

    Each is solved as if the other blocks were whole.

    Args:
        net: the compact network.
        plan: what was cut.
        evidence: of `Trials`.
        ends: block -> path of its MLP's last layer.
        ridge: relative to the mean variance of the kept units.
    """
    dropped = {edit.branch for edit in plan.drops()}
    kept = {edit.site.rpartition(".")[0]: edit.index for edit in plan.keeps()}
    values = {}
    for block, end in ends.items():
        if not any(name.rpartition(".")[0] == block for name in dropped):
            continue
        alone = evidence.moments[end]
        linear = net.get_submodule(end)
        rows, columns = linear.get_parameter("weight").shape
        units = len(alone["trial.mean"]) - rows
        index = torch.tensor(kept.get(end.rpartition(".")[0], range(units)))
        both = torch.cat([index, torch.arange(units, units + rows)])
        some = {"mean": alone["trial.mean"][both], "cov": alone["trial.cov"][both][:, both]}
        weight, offset = fitted(some, columns, ridge, biased=linear.bias is not None)
        values[f"{end}.weight"] = weight
        if linear.bias is not None:
            values[f"{end}.bias"] = offset
    return values

"""How blocks are compressed: their attention is removed, and most units of their MLP.

This module ranks units, makes the edits that remove them, and computes new weights in closed form:
last layers by least squares, towards what the whole block added to the stream, or MLPs whose
weights are drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitrim.budget.blocks import Group, hidden_of, whole_blocks
from vitrim.closed_form.obs import obs_greedy
from vitrim.closed_form.reconstruction import ridge_fit
from vitrim.files import digest
from vitrim.method.dcvit.accounting import Shape
from vitrim.method.dcvit.mlp_statistics import Gathered
from vitrim.network import structure
from vitrim.network.structure import Structure
from vitrim.network.surgery import cut
from vitrim.plan import Drop, Edit, Evidence, Keep, Plan

TrialWidth = float | Mapping[str, Shape]
"""The share of each MLP's units that is kept, or what a candidate becomes, by its first block."""
UnitSelection = Literal["obs_greedy", "surgeon", "activation", "random", "none"]
"""Which units of an MLP stay; `surgeon` is another name for obs_greedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """How a candidate is compressed for its trial.

    Args:
        width: see `TrialWidth`.
        unit_selection: which units.
        order_ridge: of their ranking by obs_greedy, relative to the mean variance.
        reconstruct: whether last layers are solved by least squares.
        fold_ridge: of that, relative to the mean variance.
        init_std: of the weights of redrawn MLPs.
        seed: of random rankings and redrawn MLPs.
    """

    width: TrialWidth
    unit_selection: UnitSelection
    order_ridge: float
    reconstruct: bool
    fold_ridge: float
    init_std: float
    seed: int

    @property
    def settings(self) -> dict[str, object]:
        """What identifies its results, as plain data; the defaults of other choices left out."""
        settings = asdict(self)
        if isinstance(self.width, Mapping):
            settings["width"] = {block: list(shape) for block, shape in self.width.items()}
        if self.unit_selection != "none":
            del settings["init_std"]
        return settings

    @property
    def gathered(self) -> Gathered:
        """The statistics of MLPs that it needs."""
        if self.reconstruct:
            return "regression"
        if self.unit_selection in ("obs_greedy", "surgeon"):
            return "moments"
        return "mean" if self.unit_selection == "activation" else "none"

    def rank(self, statistics: Mapping[str, Tensor], weight: Tensor, position: int) -> Tensor:
        """Return the importance of each unit of one MLP, (M,).

        Args:
            statistics: `mean` and `cov` of the units without the attention, (M,) or (M + D,); they
                are not read for random rankings.
            weight: of the MLP's last layer, (D, M).
            position: of the MLP among those ranked, so that random rankings differ.
        """
        units = weight.shape[1]
        match self.unit_selection:
            case "obs_greedy" | "surgeon":
                cov = statistics["cov"][:units, :units]
                return obs_greedy(cov, weight.detach().T.cpu(), ridge=self.order_ridge)
            case "activation":
                return statistics["mean"][:units].clone()
            case _:
                generator = torch.Generator().manual_seed(self.seed + position)
                return torch.rand(units, generator=generator)

    def rank_all(
        self, net: nn.Module, ends: Mapping[str, str], moments: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the importance of the units of several MLPs, (M,) each, by the keys of `ends`.

        Args:
            net: whose MLPs these are.
            ends: the paths of their last layers.
            moments: by these paths, `trial.mean` and `trial.cov` as `rank` reads them.
        """
        scores = {}
        for position, (key, end) in enumerate(ends.items()):
            found = moments.get(end, {})
            parts = [part for part in ("mean", "cov") if f"trial.{part}" in found]
            statistics = {part: found[f"trial.{part}"] for part in parts}
            weight = net.get_submodule(end).get_parameter("weight")
            scores[key] = self.rank(statistics, weight, position)
        return scores


def edits_of(described: Structure, shape: Shape, scores: Mapping[str, Tensor]) -> tuple[Edit, ...]:
    """Return the edits that compress some blocks.

    Args:
        described: the network.
        shape: what the blocks become.
        scores: hidden site -> importance of its units; without scores the first ones stay.
    """
    widths, removed = shape
    branches = whole_blocks(described)
    gone = [block for block in removed if block not in widths]
    edits: list[Edit] = [
        Drop(branch=branch) for block in gone for branch in branches.get(block, (block,))
    ]
    for block, width in widths.items():
        attention, mlp = branches[block]
        site = hidden_of(described, mlp)
        size = described.sites[site].size
        if block in removed:
            edits.append(Drop(branch=attention))
        if width < size:
            index = top_units(scores.get(site, torch.zeros(size)), width)
            edits.append(Keep(site=site, index=index))
    return tuple(edits)


def shape_of_trial(described: Structure, group: Group, width: TrialWidth) -> Shape:
    """Return what a candidate becomes in its trial.

    Where `width` is a share, it loses its attentions and keeps that share of its units; a block
    without an attention is removed altogether.
    """
    if isinstance(width, Mapping):
        return width[group[0]]
    branches = whole_blocks(described)
    sizes = {
        block: described.sites[hidden_of(described, branches[block][1])].size
        for block in group
        if block in branches
    }
    widths = {block: max(1, round(width * size)) for block, size in sizes.items()}
    return Shape(widths, list(group))


def compressed(
    net: nn.Module,
    group: Group,
    evidence: Evidence,
    compression: Compression,
    ends: Mapping[str, str],
) -> nn.Module:
    """Return the network of a trial before its training, in eval mode.

    Args:
        net: the dense network.
        group: the candidate.
        evidence: of `Trials`.
        compression: how much is cut, and what becomes of the weights that stay.
        ends: block -> path of its MLP's last layer.
    """
    described = structure(net)
    shape = shape_of_trial(described, group, compression.width)
    plan = Plan(model={}, edits=edits_of(described, shape, evidence.scores))
    compact = cut(net, plan)
    values: Mapping[str, Tensor] = {}
    if compression.unit_selection == "none":
        values = redrawn(compact, plan, std=compression.init_std, seed=compression.seed)
    elif compression.reconstruct:
        values = reconstructed(compact, plan, evidence, ends, compression.fold_ridge)
    with torch.no_grad():
        for name, value in values.items():
            compact.get_parameter(name).copy_(value)
    return compact.eval()


def top_units(scores: Tensor, n: int) -> tuple[int, ...]:
    """Return the `n` units with the highest scores, ascending; ties go to the lower index."""
    order = (-scores.double()).argsort(stable=True)[:n]
    return tuple(order.sort().values.tolist())


def last_layers(described: Structure) -> dict[str, str]:
    """Return the last layer of the MLP of each block that has an attention and an MLP."""
    ends = {branch.name: branch.ends[0] for branch in described.branches}
    return {block: ends[mlp] for block, (_, mlp) in whole_blocks(described).items()}


def reconstructed(
    net: nn.Module, plan: Plan, evidence: Evidence, ends: Mapping[str, str], ridge: float
) -> dict[str, Tensor]:
    """Return weight and bias of the compressed blocks' last layers, by least squares.

    The targets are what the whole blocks added to the stream. Each layer is solved as if the other
    blocks were not compressed.

    Args:
        net: the compact network.
        plan: what was cut.
        evidence: of `Trials`.
        ends: block -> path of its MLP's last layer.
        ridge: relative to the mean variance of the kept units.
    """
    compressed = {edit.branch.rpartition(".")[0] for edit in plan.drops()}
    kept = {edit.site.rpartition(".")[0]: edit.index for edit in plan.keeps()}
    values = {}
    for block, end in ends.items():
        if block not in compressed:
            continue
        mean, cov = (evidence.moments[end][f"trial.{name}"] for name in ("mean", "cov"))
        linear = net.get_submodule(end)
        rows, columns = linear.get_parameter("weight").shape
        units = len(mean) - rows
        index = torch.tensor(kept.get(end.rpartition(".")[0], range(units)))
        both = torch.cat([index, torch.arange(units, units + rows)])
        statistics = {"mean": mean[both], "cov": cov[both][:, both]}
        weight, offset = ridge_fit(statistics, columns, ridge, biased=linear.bias is not None)
        values[f"{end}.weight"] = weight
        if linear.bias is not None:
            values[f"{end}.bias"] = offset
    return values


def redrawn(net: nn.Module, plan: Plan, *, std: float, seed: int) -> dict[str, Tensor]:
    """Return new parameters of the compressed blocks' MLPs: random weights, and biases 0.

    The numbers of an MLP depend on `seed` and its path alone, not on what else was cut.

    Args:
        net: the compact network.
        plan: what was cut.
        std: of the truncated normal distribution of weights.
        seed: of the random numbers.
    """
    described = structure(net)
    edited = [keep.site for keep in plan.keeps()] + [drop.branch for drop in plan.drops()]
    attentions = {attention.branch for attention in described.attentions}
    values = {}
    for branch in described.branches:
        if branch.name in attentions or not any(e.startswith(f"{branch.block}.") for e in edited):
            continue
        generator = torch.Generator().manual_seed(int(digest([seed, branch.name]), 16))
        for name, tensor in net.get_submodule(branch.name).named_parameters():
            value = torch.zeros(tensor.shape)
            if tensor.ndim > 1:
                nn.init.trunc_normal_(value, std=std, generator=generator)
            elif not name.endswith("bias"):  # the weight of a norm
                value += 1
            values[f"{branch.name}.{name}"] = value
    return values

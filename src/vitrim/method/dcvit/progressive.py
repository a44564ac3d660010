"""The order of recovery: compressed blocks enter the network one group after the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from vitrim.budget.blocks import Group, flatten
from vitrim.method.dcvit.compression import plan_of_trial
from vitrim.method.dcvit.trial_training import trained_tensors
from vitrim.network.surgery import cut
from vitrim.plan import Evidence


class Step(NamedTuple):
    """One step of the recovery: the blocks that enter, and all that are compressed by then.

    `trained` says that the step is finished: its blocks come from a trial, trained.
    """

    blocks: Group
    compressed: Group
    trained: bool


def compressed_blocks(
    student: nn.Module, teacher: nn.Module, groups: Sequence[Group]
) -> list[Group]:
    """Return the blocks of each group that differ in shape; groups without any are omitted."""
    pairs = (
        tuple(
            block
            for block in group
            if not _same_shapes(student.get_submodule(block), teacher.get_submodule(block))
        )
        for group in groups
    )
    return [blocks for blocks in pairs if blocks]


def progressive_steps(
    student: nn.Module, teacher: nn.Module, groups: Sequence[Group], trial: nn.Module | None
) -> Iterator[Step]:
    """Change `student` step by step: before each step, the compressed blocks of a group enter it.

    Until then, blocks are the dense network's own.

    Args:
        student: the compact network.
        teacher: the dense network.
        groups: the compressed blocks, by group, in the order in which they enter.
        trial: the network of the best trial, trained. If it is the first step, `student` takes its
            weights.
    """
    modules = {block: student.get_submodule(block) for block in flatten(groups)}
    for block in flatten(groups[1:]):
        student.set_submodule(block, copy.deepcopy(teacher.get_submodule(block)))
    trained = trial is not None and _same_shapes(student, trial)
    if trial is not None and trained:
        student.load_state_dict(trial.state_dict())
    for n, group in enumerate(groups):
        for block in group:
            student.set_submodule(block, modules[block])
        yield Step(group, tuple(flatten(groups[: n + 1])), trained and n == 0)


def best_trial(
    teacher: nn.Module, evidence: Evidence, candidates: Sequence[Group], width: float
) -> nn.Module | None:
    """Return the network of the best trial, if trials were trained, and of the dense network.

    Args:
        teacher: the dense network.
        evidence: of `Trials`.
        candidates: the groups that were tried.
        width: of the trials.
    """
    if evidence.best_trial is None:
        return None
    first_block, parameters = evidence.best_trial
    group = next(group for group in candidates if group[0] == first_block)
    net = cut(teacher, plan_of_trial(teacher, group, evidence, width))
    tensors = trained_tensors(net)
    sizes = [tensor.numel() for tensor in tensors]
    if len(parameters) != sum(sizes):
        return None  # the trial is of a network that an earlier run had compressed
    for tensor, values in zip(tensors, torch.split(parameters, sizes), strict=True):
        tensor.copy_(values.view_as(tensor))
    return net


def _same_shapes(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have parameters of the same names and shapes."""
    first, second = (
        [(name, tensor.shape) for name, tensor in net.named_parameters()] for net in (one, other)
    )
    return first == second

"""The order of recovery: compressed blocks enter the network one group after the other."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrim.budget.blocks import Group, flatten
from vitrim.method.dcvit.settings import DCViTTuning
from vitrim.method.dcvit.trial_training import trained_tensors
from vitrim.trainer.mimic import Mimic, frozen_parameters
from vitrim.trainer.phase import AllButHeldOut, Phase
from vitrim.trainer.recovery import Recovery

_log = logging.getLogger(__name__)


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


def phases_of_recovery(
    student: nn.Module,
    teacher: nn.Module,
    groups: Sequence[Group],
    trial: tuple[str, Tensor] | None,
    *,
    tuning: DCViTTuning,
    refit: Callable[[Group], Phase] | None,
    recovery_images: int | None,
) -> Iterator[Phase]:
    """Yield regression and mimicking for one group after the other, then a recovery of the whole.

    Args:
        student: the compact network, which changes between the phases (`progressive_steps`).
        teacher: the dense network.
        groups: the compressed blocks, by group, in the order in which they enter.
        trial: the best trial, if the first step may be it: see `progressive_steps`.
        tuning: how the network mimics.
        refit: returns the regression of the last layers of some blocks; None: there is none.
        recovery_images: how many images the recovery has; None: there is none.
    """
    of_recovery = None if recovery_images is None else tuning.recovery.images(recovery_images)
    for step in progressive_steps(student, teacher, groups, trial):
        if step.trained:  # a phase without training, so that the result of the trial is evaluated
            yield Mimic(student, teacher, recipe=replace(tuning.training, epochs=0))
            continue
        if refit is not None:
            yield refit(step.blocks)
        if tuning.training.epochs:
            yield Mimic(
                student,
                teacher,
                recipe=tuning.training,
                token_weight=tuning.loss.token_weight,
                pooled_weight=tuning.loss.pooled_weight,
                frozen=frozen_parameters(
                    student, step.compressed, freeze_tail=tuning.freeze_tail, dense=teacher
                ),
                images=None if of_recovery is None else AllButHeldOut(of=of_recovery),
            )
    if recovery_images is not None:
        yield Recovery(student, teacher, settings=tuning.recovery, images=recovery_images)


def progressive_steps(
    student: nn.Module,
    teacher: nn.Module,
    groups: Sequence[Group],
    trial: tuple[str, Tensor] | None,
) -> Iterator[Step]:
    """Change `student` step by step: before each step, the compressed blocks of a group enter it.

    Until then, blocks are the dense network's own.

    Args:
        student: the compact network.
        teacher: the dense network.
        groups: the compressed blocks, by group, in the order in which they enter.
        trial: the first block of the best trial, and what was trained in it (`trained_tensors`),
            one after another. If the first step has its shape, `student` takes its weights.
    """
    modules = {block: student.get_submodule(block) for block in flatten(groups)}
    for block in flatten(groups[1:]):
        student.set_submodule(block, copy.deepcopy(teacher.get_submodule(block)))
    trained = trial is not None and bool(groups) and _takes(student, groups[0], trial)
    if trial is not None and not trained:
        _log.warning(
            "the best trial (%s) has another shape than the first step, which is trained from the "
            "start: the training of trials only ranks blocks; with method.trial.width=null trials "
            "have the width that the target leaves",
            trial[0],
        )
    for n, group in enumerate(groups):
        for block in group:
            student.set_submodule(block, modules[block])
        yield Step(group, tuple(flatten(groups[: n + 1])), trained and n == 0)


def _takes(student: nn.Module, group: Group, trial: tuple[str, Tensor]) -> bool:
    """Whether `student`, with this group compressed, has the trial's shape; it takes its weights.

    It has not if the trial kept another number of units, is of another block, or is of a network
    that an earlier run had compressed.
    """
    first_block, values = trial
    tensors = trained_tensors(student)
    sizes = [tensor.numel() for tensor in tensors]
    if first_block not in group or len(values) != sum(sizes):
        return False
    for tensor, part in zip(tensors, torch.split(values, sizes), strict=True):
        tensor.copy_(part.view_as(tensor))
    return True


def _same_shapes(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have parameters of the same names and shapes."""
    first, second = (
        [(name, tensor.shape) for name, tensor in net.named_parameters()] for net in (one, other)
    )
    return first == second

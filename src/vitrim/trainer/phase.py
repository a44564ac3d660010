"""The protocols of a phase: what the runner of phases needs to know of a LightningModule.

Every member is required and none has a default: a default would be wrong for some phase that does
not mention it. `check_phase` refuses a phase that lacks one, before anything is trained.

Phases are checked by `check_phase`, never by `isinstance`: from Python 3.12 on, that does not find
submodules such as `net`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast, get_args, runtime_checkable

from lightning import LightningModule
from torch import Tensor, nn

from vitrim.errors import ConfigError
from vitrim.plan import Evidence

ResumePoint = Literal["batch", "epoch", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentedImages:
    """`images` unlabelled training images, all of them in every epoch and in every process.

    In the first epoch they are plain and in one order; from then on they are reshuffled and
    augmented again in every epoch (`vitrim.data.Loaders.augmented_dataloader`).
    """

    images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitImages:
    """Unlabelled training images without augmentation, a share of which is held out.

    Each process gets its part of the others, reshuffled in every epoch, and all that are held out,
    by `HoldsOut.hold_out` (`vitrim.data.Loaders.split_dataloaders`).

    Args:
        images: how many at most, in both parts.
        held_out: the share, 0: none.
    """

    images: int
    held_out: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AllButHeldOut:
    """All training images, augmented and labelled, but those that a later phase holds out.

    Args:
        of: the images of that phase.
    """

    of: SplitImages


class Phase(Protocol):
    """A LightningModule that works on `net` for `epochs` passes over its images."""

    @property
    def net(self) -> nn.Module:
        """The network that is scored or trained."""
        ...

    @property
    def epochs(self) -> int:
        """Passes over the images; 0: there is nothing to do."""
        ...

    @property
    def calibration_images(self) -> int | AugmentedImages | SplitImages | AllButHeldOut | None:
        """How many unlabelled training images it sees, in one order and without augmentation.

        `AugmentedImages`: so in the first epoch only. `SplitImages`: reshuffled, and some are held
        out (`HoldsOut`). None: augmented and labelled batches of the whole training set.
        `AllButHeldOut`: of all but some of it.
        """
        ...

    @property
    def resumes_at(self) -> ResumePoint:
        """Where a stopped phase resumes.

        "batch": its state dict and its checkpoint hold all that it has gathered, after every batch.
        "epoch": they do at the end of every epoch. "never": a stopped phase starts over.
        """
        ...

    @property
    def clip_norm(self) -> float:
        """Bound on the norm of the gradients, 0: none. 0 also where the phase optimises by hand."""
        ...

    @property
    def trains(self) -> bool:
        """Whether weights of `net` change by gradient.

        The statistics of folded BatchNorms are then estimated first (`vitrim.trainer.batchnorm`).
        """
        ...


@runtime_checkable
class HoldsOut(Protocol):
    """A phase whose `calibration_images` are `SplitImages`."""

    def hold_out(self, images: Iterable[Sequence[Tensor]]) -> None:
        """Take the batches of images (B, C, H, W) that are held out; empty where none are."""
        ...


@runtime_checkable
class Validated(Protocol):
    """A phase that can be validated while it trains: it has a `validation_step`."""

    best_by: str
    """The metric of a validation, in percent, of which a higher one is better."""


@runtime_checkable
class Compiles(Protocol):
    """A phase whose training steps can be compiled."""

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The networks whose outputs make the loss: the one in training, and a teacher."""
        ...


@runtime_checkable
class Reaches(Protocol):
    """A phase that says which parameters its loss depends on."""

    def outputs(self, images: Tensor) -> Sequence[Tensor]:
        """Return what the loss reads of the network in training, for images (B, C, H, W)."""
        ...


@runtime_checkable
class Steps(Protocol):
    """A phase that takes the steps of optimisers by itself, one for each batch."""

    own_steps: bool
    """Whether it takes any."""


class Scorer(Phase, Protocol):
    """A phase that learns what matters in `net`."""

    @property
    def settings(self) -> Mapping[str, object]:
        """What identifies the result: a finished scorer is reused by runs with equal settings.

        What only matters for the plan (strength, target) does not belong here.
        """
        ...

    def evidence(self) -> Evidence:
        """Return what was learned and leave `net` plain, ready to be cut; safe to call twice."""
        ...


PHASE = ("net", "epochs", "calibration_images", "resumes_at", "clip_norm", "trains")
SCORER = (*PHASE, "settings", "evidence")


def stage_name(phase: Phase, stages: Iterable[str]) -> str:
    """Return the name of a phase; further phases of one class are numbered from 2."""
    kind = type(phase).__name__.lower()
    number = 1 + sum(name.split("-")[0] == kind for name in stages)
    return kind if number == 1 else f"{kind}-{number}"


def check_phase(phase: object, members: tuple[str, ...] = PHASE) -> None:
    """Refuse a phase that does not follow its protocol.

    A phase that resumes needs something to resume from: parameters or buffers besides those of
    `net`, an `on_save_checkpoint` of its own, or weights of `net` that it trains.

    Raises:
        ConfigError: naming the class, and the members that it lacks or whose value is wrong.
    """
    name = type(phase).__name__
    if not isinstance(phase, LightningModule):
        raise ConfigError(f"{name}: a phase is a LightningModule (vitrim.trainer.phase)")
    missing = [member for member in members if not hasattr(phase, member)]
    if missing:
        raise ConfigError(
            f"{name} lacks {', '.join(missing)}: a phase has {', '.join(members)} "
            "(vitrim.trainer.phase)"
        )
    splits = isinstance(cast(Phase, phase).calibration_images, SplitImages)
    if splits and not isinstance(phase, HoldsOut):
        raise ConfigError(
            f"{name} lacks hold_out, which takes the images that are held out of its SplitImages "
            "(vitrim.trainer.phase.HoldsOut)"
        )
    resumes_at, trains = cast(Phase, phase).resumes_at, cast(Phase, phase).trains
    if resumes_at not in get_args(ResumePoint):
        raise ConfigError(
            f"{name}.resumes_at={resumes_at!r}: expected one of {', '.join(get_args(ResumePoint))}"
        )
    saves = type(phase).on_save_checkpoint is not LightningModule.on_save_checkpoint
    if resumes_at != "never" and not (trains or saves or _own_state(phase)):
        raise ConfigError(
            f"{name}.resumes_at={resumes_at!r}, but it trains nothing and has no buffers or "
            "parameters of its own: what it gathers would be lost when it is stopped; register "
            "buffers, or set it to 'never'"
        )


def check_scorer(phase: object) -> Scorer:
    """Return a scorer, once it is known to follow its protocol.

    A scorer that looks at images needs buffers or parameters of its own: a later run loads its
    result from them.

    Raises:
        ConfigError: as `check_phase`.
    """
    check_phase(phase, SCORER)
    scorer = cast(Scorer, phase)
    if scorer.epochs and not scorer.trains and not _own_state(cast(LightningModule, phase)):
        raise ConfigError(
            f"{type(phase).__name__} trains nothing and has no buffers or parameters of its own: "
            "a later run could not load what it found; register buffers for it"
        )
    return scorer


def _own_state(phase: LightningModule) -> bool:
    """Whether the state dict of `phase` has more than the state of its `net`."""
    return any(not key.startswith("net.") for key in phase.state_dict())

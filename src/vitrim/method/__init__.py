"""What a compression method is: levels, scorer, plan, compensation, recovery. Types only.

A method is one file here, or a folder that holds all that is its own, and one yaml in conf/method/.
No method imports another. May import: sensitivity, deploy, trainer, budget, store, measure,
closed_form, network, data, jobs and what is below them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from vitrim.budget.cost import Cost
from vitrim.budget.target import Metric, Target, at_strength
from vitrim.errors import ConfigError, VitrimError
from vitrim.network.structure import Structure
from vitrim.plan import Evidence, Plan, Proposal
from vitrim.trainer.phase import Phase, Scorer
from vitrim.trainer.recipe import Recipe

Granularity = Literal["unit", "rank", "block", "none"]


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of numbers with three functions; its yaml's `_target_` is its address.

    `levels` are the shares of `metric` that are kept at strengths 0 to 5. `granularity` says what
    goes at a time; a method that removes "none" trains what is there, by its `recovery`.
    """

    @property
    def levels(self) -> Sequence[float]:
        """The share kept at each strength: six, falling from 1; (1,) if nothing is removed."""
        ...

    @property
    def metric(self) -> Metric:
        """What `levels` are shares of."""
        ...

    @property
    def granularity(self) -> Granularity:
        """What goes at a time."""
        ...

    def check(self, cost: Cost, target: Target) -> None:
        """Raise a VitrimError, before any training, if the target cannot be reached."""
        ...

    def scorer(self, net: nn.Module) -> Scorer:
        """Return the phase that scores `net`, which it may train."""
        ...

    def plan(self, net: nn.Module, evidence: Evidence, cost: Cost, target: Target) -> Proposal:
        """Choose the edits: pure, deterministic, within the target; all tensors are on the CPU."""
        ...


@runtime_checkable
class ScoresForTarget(Protocol):
    """A method whose scorer depends on the target.

    Runs call `scorer_for` in place of `scorer`, and share the scorer only if its settings are
    equal.
    """

    def scorer_for(self, net: nn.Module, cost: Cost, target: Target) -> Scorer:
        """Return the phase that scores `net` for this target."""
        ...


@runtime_checkable
class Revised(Protocol):
    """A method of which some settings lead to another result than in an earlier version."""

    @property
    def revision(self) -> int:
        """1 as long as the result is what it always was; runs are identified by other numbers."""
        ...


@runtime_checkable
class TrainsGates(Method, Protocol):
    """A method whose scores are gates, trained together with the weights under an L1 penalty."""

    @property
    def l1(self) -> float:
        """The factor of the sum of all |gates| in the loss."""
        ...

    @property
    def gate_lr(self) -> float:
        """The peak learning rate of the gates."""
        ...

    def gates(self, described: Structure) -> Mapping[str, str]:
        """Return the weights whose columns have gates: parameter name -> site name."""
        ...


@runtime_checkable
class Compensates(Protocol):
    """A method that changes kept weights in closed form, right after the cut."""

    def compensation_of(
        self, net: nn.Module, compact: nn.Module, plan: Plan, evidence: Evidence
    ) -> Mapping[str, Tensor]:
        """Return new values, by name, for parameters of `compact`, the cut of `net`.

        Pure: what makes up in closed form for what was cut, from what the scorer saw.
        """
        ...


@runtime_checkable
class Recovers(Protocol):
    """A method with phases that follow on the compact network."""

    def recovery(
        self, student: nn.Module, teacher: nn.Module, evidence: Evidence, n_classes: int
    ) -> Iterable[Phase]:
        """Return the phases (`vitrim.trainer.phase.Phase`) in order.

        A generator may change the net between them.
        """
        ...


@runtime_checkable
class TrainsWithLabels(Protocol):
    """A method with training on labelled images, before or after the cut or both.

    With `control=true` the dense network has the same training.
    """

    @property
    def labelled_training(self) -> Sequence[Recipe]:
        """The recipes of this training, in order; none with settings that do without labels.

        The last one is the fine-tuning, in which a teacher may help (`teacher.name`).
        """
        ...


def scorer_of(method: Method, net: nn.Module, cost: Cost, target: Target) -> Scorer:
    """Return the phase by which `method` scores `net` in a run with this target."""
    if isinstance(method, ScoresForTarget):
        return method.scorer_for(net, cost, target)
    return method.scorer(net)


def can_compress(method: Method, cost: Cost, net: nn.Module) -> bool:
    """Whether `method` can remove something of `net`, at strength 1.

    Args:
        method: with its own settings.
        cost: of the network.
        net: the network, without weights.
    """
    if method.granularity == "none":
        return False
    try:
        target = Target(metric=method.metric, keep=at_strength(1.0, method.levels))
        method.check(cost, target)
        scorer_of(method, net, cost, target)
    except VitrimError:
        return False
    return True


METHOD = ("levels", "metric", "granularity", "check", "scorer", "plan")


def check_method(method: object) -> None:
    """Refuse what is no method.

    Raises:
        ConfigError: naming the class and the members that it lacks.
    """
    missing = [member for member in METHOD if not hasattr(method, member)]
    if missing:
        raise ConfigError(
            f"{type(method).__name__} lacks {', '.join(missing)}: a method has "
            f"{', '.join(METHOD)}, and may have compensation_of and recovery (vitrim.method)"
        )

"""The plan: which edits turn a dense network into its compact one, as plain data with a JSON form.

Nothing here needs a network or a tensor library, so that plans can be read, checked and compared
anywhere.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import lt
from typing import TYPE_CHECKING, Any

from vitrim.errors import VitrimError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
"""Version of the JSON form that is written; 1, without `method`, is read, too."""

MAX_BYTES = 64 * 2**20
MAX_EDITS = 100_000
MAX_NAME = 256
MAX_DEPTH = 16


class PlanError(VitrimError):
    """A plan that is malformed, or that does not fit the network it is applied to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """Keep only `index` of the units at `site`; everything else there is sliced away.

    `index` is strictly ascending and counts in the units of the network the plan was made for.

    >>> Keep(site="blocks.0.mlp.hidden", index=(0, 2)).index
    (0, 2)
    """

    site: str
    index: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_name("site", self.site)
        if not self.index:
            raise PlanError(
                f"Keep(site={self.site!r}, index=()): expected at least one unit; "
                "to remove everything, Drop the branch"
            )
        ascending = all(map(lt, self.index, self.index[1:]))
        if not ascending or self.index[0] < 0:
            raise PlanError(
                f"Keep(site={self.site!r}): index must be non-negative and strictly ascending"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """Replace the Linear layer at module path `linear` by two factors of rank `rank`."""

    linear: str
    rank: int

    def __post_init__(self) -> None:
        _check_name("linear", self.linear)
        if self.rank < 1:
            raise PlanError(
                f"LowRank(linear={self.linear!r}, rank={self.rank}): expected rank >= 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Remove the residual branch at module path `branch`, its norm included."""

    branch: str

    def __post_init__(self) -> None:
        _check_name("branch", self.branch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8:
    """Store the weight of the Linear layer at module path `linear` in int8, one scale per row.

    With `dynamic`, each of its input vectors is rounded to int8 at run time as well. A layer that
    is also sliced or factorised is rounded afterwards, both of its factors.
    """

    linear: str
    dynamic: bool = False

    def __post_init__(self) -> None:
        _check_name("linear", self.linear)


Edit = Keep | LowRank | Drop | Int8


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """What a method decides: the edits, and what it says of them.

    `notes` are the method's choices, a few plain values that become the plan's provenance;
    `diagnostics` are curves and scores for figures, which a run writes to diagnostics.json.
    """

    edits: tuple[Edit, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Edits against one dense network.

    `model` says how the dense skeleton is built (`name` and `args` of `timm.create_model`), so
    that a saved network needs neither a download nor a pickle. `method` names what made the plan,
    `a+b` where one followed the other. `provenance` is a record for people: nothing is computed
    from it.
    """

    model: Mapping[str, Any]
    edits: tuple[Edit, ...]
    method: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[tuple[str, str]] = set()
        for edit in self.edits:
            key = _address(edit)
            if key in seen:
                raise PlanError(f"{key[0]} {key[1]!r} is edited twice in one plan")
            seen.add(key)

    def __repr__(self) -> str:
        """Name the network and the method, and count the edits: their indices may be thousands."""
        kinds = Counter(type(edit).__name__ for edit in self.edits)
        counts = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items()) or "no edits"
        name, method = self.model.get("name", ""), self.method
        return f"Plan({', '.join(part for part in (str(name), method, counts) if part)})"

    def keeps(self) -> Iterator[Keep]:
        """Iterate over the slices."""
        return (edit for edit in self.edits if isinstance(edit, Keep))

    def low_ranks(self) -> Iterator[LowRank]:
        """Iterate over the factorised layers."""
        return (edit for edit in self.edits if isinstance(edit, LowRank))

    def drops(self) -> Iterator[Drop]:
        """Iterate over the dropped branches."""
        return (edit for edit in self.edits if isinstance(edit, Drop))

    def int8s(self) -> Iterator[Int8]:
        """Iterate over the int8 layers."""
        return (edit for edit in self.edits if isinstance(edit, Int8))

    def in_float(self) -> Plan:
        """Return the plan without its int8 layers."""
        return replace(self, edits=tuple(edit for edit in self.edits if not isinstance(edit, Int8)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a scorer learned about a network; empty where it saw no image.

    Args:
        scores: site -> one importance per unit, shape (size,), higher is kept.
        moments: site or layer -> further statistics, by name.
        block_scores: block (the first of a group) -> how much the network loses without it.
        block_savings: block (the first of a group) -> share of the latency that it takes, where
            that was measured.
        images: calibration images, (n, C, H, W), for closed forms that need them.
        synthetic: images that the network made up, (n, C, H, W).
        best_trial: the block that is easiest to compress, and the parameters of the network in
            which it is compressed and trained, flattened one after another, shape (n,).
    """

    scores: Mapping[str, Tensor] = field(default_factory=dict)
    moments: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    block_scores: Mapping[str, float] = field(default_factory=dict)
    block_savings: Mapping[str, float] = field(default_factory=dict)
    images: Tensor | None = None
    synthetic: Tensor | None = None
    best_trial: tuple[str, Tensor] | None = None


def dumps(plan: Plan) -> str:
    """Return the JSON text of a plan; `loads(dumps(plan)) == plan`."""
    document = {
        "format": FORMAT,
        "model": plan.model,
        "method": plan.method,
        "edits": [_to_json(edit) for edit in plan.edits],
        "provenance": plan.provenance,
    }
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False)


def loads(text: str) -> Plan:
    """Parse the JSON text of a plan, trusting nothing in it.

    Raises:
        PlanError: too large, not JSON, unknown keys, wrong types, or indices out of order.
    """
    if len(text) > MAX_BYTES:
        raise PlanError(f"plan of {len(text)} characters: expected at most {MAX_BYTES}")
    try:
        document = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"plan is not valid JSON: {error}") from None
    keys = {"format", "model", "edits", "provenance"}
    if isinstance(document, dict) and document.get("format") != 1:
        keys.add("method")
    _check_keys("plan", document, keys)
    free = {key: value for key, value in document.items() if key != "edits"}
    _check_depth(free)  # the edits have a form of their own, which is checked below
    check_json(free, "plan")
    if type(document["format"]) is not int or document["format"] not in (1, FORMAT):
        raise PlanError(f"plan format {document['format']!r}: expected 1 or {FORMAT}")
    edits = document["edits"]
    if not isinstance(edits, list) or len(edits) > MAX_EDITS:
        raise PlanError(f"edits: expected a list of at most {MAX_EDITS}")
    for key in ("model", "provenance"):
        if not isinstance(document[key], dict):
            raise PlanError(f"{key}: expected an object")
    method = document.get("method", document["provenance"].get("method", ""))
    if not isinstance(method, str) or len(method) > MAX_NAME:
        raise PlanError(f"method: expected a name of at most {MAX_NAME} characters")
    return Plan(
        model=document["model"],
        edits=tuple(_from_json(edit) for edit in edits),
        method=method,
        provenance=document["provenance"],
    )


def _to_json(edit: Edit) -> dict[str, Any]:
    match edit:
        case Keep(site=site, index=index):
            return {"keep": site, "index": list(index)}
        case LowRank(linear=linear, rank=rank):
            return {"low_rank": linear, "rank": rank}
        case Drop(branch=branch):
            return {"drop": branch}
        case Int8(linear=linear, dynamic=dynamic):
            return {"int8": linear, "dynamic": dynamic}


def _from_json(document: Any) -> Edit:
    match document:
        case {"keep": str(site), "index": list(index), **rest} if not rest:
            return Keep(site=site, index=_integers("index", index))
        case {"low_rank": str(linear), "rank": rank, **rest} if not rest:
            return LowRank(linear=linear, rank=_integer("rank", rank))
        case {"drop": str(branch), **rest} if not rest:
            return Drop(branch=branch)
        case {"int8": str(linear), "dynamic": bool(dynamic), **rest} if not rest:
            return Int8(linear=linear, dynamic=dynamic)
    raise PlanError(
        f"edit {reprlib.repr(document)}: expected exactly keep+index, low_rank+rank, drop or "
        "int8+dynamic"
    )


def _address(edit: Edit) -> tuple[str, str]:
    match edit:
        case Keep(site=site):
            return "site", site
        case LowRank(linear=linear):
            return "linear", linear
        case Drop(branch=branch):
            return "branch", branch
        case Int8(linear=linear):
            return "int8 linear", linear


def _integer(name: str, value: Any) -> int:
    if type(value) is not int or abs(value) > 2**31:
        raise PlanError(f"{name}: {str(value)[:40]!r} is not an integer in range")
    return value


def _integers(name: str, values: list[Any]) -> tuple[int, ...]:
    if {*map(type, values)} <= {int} and max(map(abs, values), default=0) <= 2**31:
        return tuple(values)
    raise PlanError(f"{name}: {reprlib.repr(values)} is not a list of integers in range")


def _check_name(kind: str, name: str) -> None:
    if not name or len(name) > MAX_NAME:
        raise PlanError(f"{kind}: expected a name of 1 to {MAX_NAME} characters")


def _check_keys(what: str, document: Any, allowed: set[str]) -> None:
    if not isinstance(document, dict) or set(document) != allowed:
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise PlanError(f"{what}: expected the keys {sorted(allowed)}, found {found}")


def _check_depth(document: Any) -> None:
    level: Sequence[Any] = [document]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (
                node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
            )
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise PlanError(f"plan is nested deeper than {MAX_DEPTH}")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def check_json(value: Any, what: str) -> None:
    """Raise PlanError unless `value` is made of JSON types only, finite numbers included."""
    match value:
        case None | bool() | int() | str():
            return
        case float() if math.isfinite(value):
            return
        case list() | tuple():
            for item in value:
                check_json(item, what)
        case dict() if all(isinstance(key, str) for key in value):
            for item in value.values():
                check_json(item, what)
        case _:
            raise PlanError(f"{what}: {value!r} is not a plain JSON value")

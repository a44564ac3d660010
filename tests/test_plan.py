from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrim.plan import (
    MAX_DEPTH,
    MAX_NAME,
    Drop,
    Edit,
    Int8,
    Keep,
    LowRank,
    Plan,
    PlanError,
    check_json,
    dumps,
    loads,
)

NAMES = st.text(min_size=1, max_size=20)
KEEPS = st.builds(
    lambda site, index: Keep(site=site, index=tuple(sorted(index))),
    NAMES,
    st.sets(st.integers(0, 2**31), min_size=1),
)
LOW_RANKS = st.builds(LowRank, linear=NAMES, rank=st.integers(1, 2**31))
INT8S = st.builds(Int8, linear=NAMES, dynamic=st.booleans())
EDITS = st.one_of(KEEPS, LOW_RANKS, st.builds(Drop, branch=NAMES), INT8S)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


def address(edit: Edit) -> tuple[type, str]:
    match edit:
        case Keep(site=name) | LowRank(linear=name) | Drop(branch=name) | Int8(linear=name):
            return type(edit), name


def document(**changes: Any) -> str:
    plain = {"format": 1, "model": {}, "edits": [], "provenance": {}}
    return json.dumps({**plain, **changes})


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@given(model=OBJECTS, edits=st.lists(EDITS, unique_by=address, max_size=4), provenance=OBJECTS)
def test_a_plan_comes_back_from_its_text(
    model: dict[str, Any], edits: list[Edit], provenance: dict[str, Any]
) -> None:
    plan = Plan(model=model, edits=tuple(edits), provenance=provenance)
    assert loads(dumps(plan)) == plan
    assert dumps(loads(dumps(plan))) == dumps(plan)


def test_edits_come_back_in_their_order_and_by_kind() -> None:
    edits: tuple[Edit, ...] = (
        Drop(branch="b"),
        Keep(site="s", index=(1, 4)),
        LowRank(linear="l", rank=2),
        Int8(linear="l"),
    )
    plan = loads(dumps(Plan(model={}, edits=edits)))
    assert plan.edits == edits
    assert [*plan.keeps()] == [edits[1]]
    assert [*plan.low_ranks()] == [edits[2]]
    assert [*plan.drops()] == [edits[0]]
    assert [*plan.int8s()] == [edits[3]]
    assert plan.in_float().edits == edits[:3]


@pytest.mark.parametrize(
    "index",
    [[], [1, 0], [0, 0], [-1], [-1, 0], [True], [False, True], [0.0], ["0"], [None], [2**40], 3],
    ids=str,
)
def test_a_text_with_such_an_index_is_refused(index: Any) -> None:
    with pytest.raises(PlanError):
        loads(document(edits=[{"keep": "site", "index": index}]))


@pytest.mark.parametrize(
    "edit",
    [
        {"keep": "site"},
        {"keep": "site", "index": [0], "more": 1},
        {"keep": "", "index": [0]},
        {"keep": "s" * (MAX_NAME + 1), "index": [0]},
        {"keep": 3, "index": [0]},
        {"low_rank": "linear", "rank": 0},
        {"low_rank": "linear", "rank": True},
        {"low_rank": "linear", "rank": 1.5},
        {"drop": "branch", "index": [0]},
        {"drop": None},
        {"int8": "linear"},
        {"int8": "linear", "dynamic": 1},
        {},
        [],
        "keep",
    ],
    ids=lambda edit: str(edit)[:40],
)
def test_a_text_with_such_an_edit_is_refused(edit: Any) -> None:
    with pytest.raises(PlanError):
        loads(document(edits=[edit]))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"format": "1"},
        {"format": True},
        {"format": None},
        {"extra": 1},
        {"edits": {}},
        {"edits": None},
        {"edits": [{"drop": "b"}] * 2},
        {"edits": [{"keep": "s", "index": [0]}, {"keep": "s", "index": [1]}]},
        {"model": []},
        {"provenance": "text"},
        {"provenance": {"value": nested(MAX_DEPTH)}},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_text_with_such_a_key_is_refused(changes: dict[str, Any]) -> None:
    loads(document())
    with pytest.raises(PlanError):
        loads(document(**changes))


@pytest.mark.parametrize("key", ["format", "model", "edits", "provenance"])
def test_a_text_without_one_of_its_keys_is_refused(key: str) -> None:
    missing = {name: value for name, value in json.loads(document()).items() if name != key}
    with pytest.raises(PlanError, match=key):
        loads(json.dumps(missing))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        document(provenance={"value": float("nan")}),
        document(provenance={"value": float("inf")}),
        document(provenance={"value": "HUGE"}).replace('"HUGE"', "1e999"),
        document() + "x",
    ],
    ids=lambda text: text[-40:],
)
def test_what_is_no_plain_json_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        loads(text)


@pytest.mark.parametrize(
    "index", [(), (1, 0), (0, 0), (-1, 0)], ids=["empty", "falling", "twice", "negative"]
)
def test_a_slice_needs_an_ascending_index(index: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="blocks"):
        Keep(site="blocks.0.mlp.hidden", index=index)


def test_a_site_is_edited_once_in_a_plan() -> None:
    once = Keep(site="s", index=(0,))
    with pytest.raises(PlanError, match="'s' is edited twice"):
        Plan(model={}, edits=(once, Keep(site="s", index=(1,))))
    Plan(model={}, edits=(once, LowRank(linear="s", rank=1), Drop(branch="s")))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1: 2}, object, {"a": [b"bytes"]}, {1}], ids=repr
)
def test_values_without_a_json_form_are_named(value: Any) -> None:
    with pytest.raises(PlanError, match="provenance"):
        check_json({"key": value}, "provenance")


def test_plans_are_read_without_torch() -> None:
    code = "import sys, vitrim.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("limit", ["MAX_BYTES", "MAX_EDITS"])
def test_a_text_beyond_the_limits_is_refused(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    text = document(edits=[{"drop": "a"}, {"drop": "b"}])
    loads(text)
    monkeypatch.setattr(f"vitrim.plan.{limit}", 1)
    with pytest.raises(PlanError, match="at most 1"):
        loads(text)


def test_a_plan_is_shown_in_one_short_line() -> None:
    edits = (
        Keep(site="blocks.0.mlp.hidden", index=tuple(range(5000))),
        Keep(site="blocks.1.mlp.hidden", index=(0,)),
        Drop(branch="blocks.1.attn"),
    )
    plan = Plan(model={"name": "vit_base_patch16_224", "args": {}}, edits=edits, method="joint")
    assert repr(plan) == "Plan(vit_base_patch16_224, joint, 2 Keep, 1 Drop)"
    assert repr(Plan(model={}, edits=())) == "Plan(no edits)"

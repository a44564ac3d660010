"""The reader of run folders: what each file gives, what is refused, and that it is light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reports import document, save
from vitrim.deploy.runfolder import (
    DIAGNOSTICS,
    RunFolderError,
    find_runs,
    read_diagnostic,
    read_plan,
    read_recipe,
    read_report,
    read_run,
)
from vitrim.plan import Plan, dumps


def test_a_record_has_nested_keys_joined_by_dots_in_their_order(tmp_path: Path) -> None:
    record = read_run(save(tmp_path / "run")).record
    assert record["choices.model"] == "vit_digits"
    assert [key for key in record if key.startswith("kept.")] == [
        *("kept.params", "kept.macs", "kept.units")
    ]
    assert record["label"] == "vtp"


def test_a_deeply_nested_report_is_flat(tmp_path: Path) -> None:
    folder = save(tmp_path / "run")
    deep: object = 1
    for _ in range(900):
        deep = {"a": deep}
    (folder / "report.json").write_text(json.dumps({**document(), "deep": deep}))
    assert read_report(folder)["deep"] == deep
    with pytest.raises(RunFolderError, match=r"out of range, or no plain text: deep\.a\.a"):
        read_run(folder)


def test_finished_and_unfinished_runs_are_found(tmp_path: Path) -> None:
    finished = save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "recipe.yaml").touch()
    assert find_runs([tmp_path, tmp_path / "a"]) == ([finished], [tmp_path / "b"])
    with pytest.raises(RunFolderError, match=r"no report.json below \(1 unfinished runs\)"):
        find_runs([tmp_path / "b"])
    assert find_runs([tmp_path / "b"], empty=True) == ([], [tmp_path / "b"])


def test_what_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_recipe(tmp_path) == {}
    assert read_plan(tmp_path) is None
    assert read_diagnostic(tmp_path, "curves") is None
    with pytest.raises(RunFolderError, match=r"report\.json: cannot be read"):
        read_report(tmp_path)


@pytest.mark.parametrize("text", ["model: [", "- 1", "model: 3", "[" * 2_000, "a: !!python/name:x"])
def test_a_damaged_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RunFolderError, match=r"recipe\.yaml cannot be read"):
        read_recipe(tmp_path)


def test_a_large_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1\n" * 2**18)
    with pytest.raises(RunFolderError, match=r"recipe\.yaml: expected up to 1,048,576 bytes"):
        read_recipe(tmp_path)


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"plan\.json: plan is not valid JSON"):
        read_plan(tmp_path)


def test_diagnostics_come_before_the_plan_of_an_earlier_version(tmp_path: Path) -> None:
    plan = Plan(model={}, edits=(), provenance={"trials": {"a": 1.0}, "blocks": ["a"]})
    (tmp_path / "plan.json").write_text(dumps(plan))
    earlier = read_diagnostic(tmp_path, "trials")
    assert earlier is not None
    assert earlier.where == f"{tmp_path / 'plan.json'}: provenance.trials"
    assert (earlier.value, earlier.notes["blocks"]) == ({"a": 1.0}, ["a"])
    (tmp_path / DIAGNOSTICS).write_text(json.dumps({"trials": {"b": 2.0}}))
    present = read_diagnostic(tmp_path, "trials")
    assert present is not None
    assert present.where == f"{tmp_path / DIAGNOSTICS}: trials"
    assert (present.value, present.notes) == ({"b": 2.0}, plan.provenance)
    assert not present.is_composed


def test_reading_imports_no_torch() -> None:
    code = "import sys, vitrim.deploy.runfolder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

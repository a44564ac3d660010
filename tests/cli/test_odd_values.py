"""Values of a wrong kind: every refusal is one sentence that names the key, and no traceback."""

from __future__ import annotations

import pytest

from command import Command
from refusals import assert_refused
from vitrim.cli import app

LONG = "x" * 200_000


def test_groups_that_are_values_or_lack_a_key(command: Command) -> None:
    words = ["latency=null", "target=null", "~checkpoint.minutes"]
    expected = [
        "latency=null: expected keys and values: latency.KEY=VALUE",
        "target=null: expected keys and values",
        "checkpoint.minutes: missing",
    ]
    assert_refused(command, *words, expected=expected)


@pytest.mark.parametrize("word", ["method=null", "experiment=null", "hydra=null", "data=3"])
def test_a_choice_that_is_no_name(command: Command, word: str) -> None:
    assert_refused(command, word, expected=[word, "string or a list"])


def test_a_group_that_is_a_value_in_a_sweep(command: Command) -> None:
    assert_refused(command, "-m", "sweep=null", expected=["sweep=null: expected keys and values"])


def test_values_of_a_wrong_kind_are_refused_together(command: Command) -> None:
    words = [
        *("seed=1e30", "batchnorm_images=''", "from_run=[]", "latency.repeats=true"),
        *("checkpoint.minutes={}", "sweep.minutes=-inf", "quantize=1", "tracking=[1]"),
        *("strength=nan", f"model.name={LONG}", "method.levels=x", "data.batch_size=null"),
    ]
    expected = [
        *("seed=1e+30", "batchnorm_images=: expected", "from_run=[]: expected"),
        *("latency.repeats=true", "checkpoint.minutes={}", "sweep.minutes=-inf", "quantize=1"),
        *("tracking=[1]", "model.name=xxx", "data.batch_size="),
    ]
    done = command(*words)
    assert len(done.message) < 6000
    assert_refused(command, *words, expected=expected)


@pytest.mark.parametrize("out", ["", "[]", "null", "{}", "3"])
def test_a_folder_of_runs_that_is_no_name(command: Command, out: str) -> None:
    assert_refused(command, f"out={out}", expected=["out="])


def test_what_no_check_names_ends_in_the_choices(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(cfg: object) -> None:
        raise TypeError("unsupported operand")

    monkeypatch.setattr(app, "build_job", build)
    assert_refused(
        command,
        "seed=3",
        expected=["seed=3", "cannot be set up (TypeError: unsupported operand)"],
    )

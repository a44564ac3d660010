"""What a run says in the terminal."""

from __future__ import annotations

from vitrim.report.console import opening, result_table

SIDE = {"macs": 2_000_000, "params": 4000, "top1": 90.0, "latency_ms": 1.5}


def test_the_table_has_the_stages_between_dense_and_final() -> None:
    report = {
        "dense": SIDE,
        "compact": {**SIDE, "macs": 1_000_000, "top1": 88.25, "latency_ms": 1.0},
        "stages": {"cut": {"top1": 70.0}, "classify": {"top1": 88.25}},
        "latency": {"batch": 8},
    }
    lines = [line.split() for line in result_table(report).splitlines()]
    assert lines == [
        ["top-1", "MACs", "params", "ms", "(batch", "8)"],
        ["dense", "90.00", "2.00", "M", "4.00", "k", "1.50"],
        ["after", "the", "cut", "70.00", "1.00", "M", "4.00", "k"],
        ["final", "88.25", "1.00", "M", "4.00", "k", "1.00"],
    ]


def test_without_images_accuracies_are_dashes() -> None:
    side = {**SIDE, "top1": None}
    report = {"dense": side, "compact": side, "stages": {"cut": side}, "latency": {"batch": 1}}
    assert [line.split()[1] for line in result_table(report).splitlines()[1:]] == ["-", "-"]


def test_a_number_that_is_kept_is_written_whole() -> None:
    assert opening("vtp", "x", ("units", 30922), None, 7) == "vtp on x: 30,922 units, seed 7"


def test_the_control_is_the_last_line() -> None:
    report = {
        "dense": SIDE,
        "compact": SIDE,
        "stages": {"cut": SIDE},
        "latency": {"batch": 1},
        "control": {"top1": 91.5, "top5": 99.0, "epochs": 30},
    }
    last = result_table(report).splitlines()[-1].split()
    assert last == ["control", "91.50", "2.00", "M", "4.00", "k", "1.50"]

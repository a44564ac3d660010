"""Pareto fronts: what is compared with what, which rows are on a front, and the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reports import NO_WANDB, failure, save
from vitrim.cli.report import main
from vitrim.deploy.runfolder import read_run
from vitrim.paper.agreement import WEIGHTS
from vitrim.report import compare, pareto
from vitrim.report.layout import PRINTED, SCREEN, Layout, render, rendered
from vitrim.report.pareto import Cost, comparisons, costs_of, front, marks, on_front
from vitrim.report.summary import Row, summarise
from vitrim.report.tables import int8_table, results_table

CONDITIONS = (1, "cpu", "fp32", 2)


def finished(
    folder: Path,
    *,
    mb: float | None = 1.0,
    ms: float = 2.0,
    params: int = 100_000,
    threads: int = 2,
    int8: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
    **choices: object,
) -> Path:
    """Save a run with this size and latency; `more` are further entries of its report."""
    save(folder, **{"strength": 1.0, **choices})
    report = json.loads((folder / "report.json").read_text())
    report["compact"] |= {"params": params, "latency_ms": ms}
    report["latency"]["threads"] = threads
    if mb is not None:
        report["compact"]["mb"], report["dense"]["mb"] = mb, 2.0
    if int8:
        report |= {"float_mb": mb, "quantized": int8}
    (folder / "report.json").write_text(json.dumps(report | (more or {})))
    return folder


def rows_of(*folders: Path) -> list[Row]:
    return summarise([read_run(folder) for folder in folders])


def test_the_front_of_points() -> None:
    assert front([]) == []
    assert front([(2.0, 5.0), (1.0, 5.0), (1.0, 4.0), (3.0, 5.5), (1.0, 5.0)]) == [1, 4, 3]


def test_rows_of_all_methods_are_on_fronts_by_each_cost(tmp_path: Path) -> None:
    rows = rows_of(
        finished(tmp_path / "1", method="a", top1=95.0, macs=8_000_000, mb=1.5, ms=3.0),
        finished(tmp_path / "2", method="b", top1=94.0, macs=8_000_000, mb=1.0, ms=3.5),
        finished(tmp_path / "3", method="c", top1=90.0, macs=4_000_000, mb=1.2, params=200_000),
        finished(tmp_path / "4", method="d", top1=99.0, macs=10_000_000, mb=2.0, ms=4.0),
    )
    (compared,) = comparisons(rows)
    assert [cost.measure for cost in costs_of(compared)] == ["macs", "params", "mb", "latency_ms"]
    macs = [(network.row, network.top1) for network in on_front(compared, Cost("macs"))]
    assert macs == [(2, 90.0), (0, 95.0), (3, 99.0)]
    assert marks(rows) == [{"": "MSL"}, {"": "S"}, {"": "ML"}, {"": "MPSL"}]
    assert [line[-1] for line in results_table(rows)] == ["front", "MSL", "S", "ML", "MPSL"]


def test_what_is_worse_than_the_dense_network_is_on_no_front(tmp_path: Path) -> None:
    slow = finished(tmp_path / "1", top1=97.0, ms=5.0, mb=None)
    rows = rows_of(slow, finished(tmp_path / "2", method="a", top1=96.0, mb=None))
    (compared,) = comparisons(rows)
    dense = compared.networks[0]
    assert (dense.row, dense.top1) == (None, 98.0)
    assert dense.costs[Cost("latency_ms", CONDITIONS)] == 4.0
    assert marks(rows) == [{"": "L"}, {"": "MP"}]  # by MACs and params both are alike but in top-1


def test_networks_in_int8_count_by_size_and_latency(tmp_path: Path) -> None:
    int8 = {"int8_dynamic": {"top1": 93.0, "top5": 99.0, "mb": 0.4, "latency_ms": 1.0}}
    unmeasured = {"int8_weight_only": {"top1": None, "top5": None, "mb": 0.1, "latency_ms": None}}
    rows = rows_of(
        finished(tmp_path / "1", method="a", top1=94.0, int8=int8 | unmeasured),
        finished(tmp_path / "2", method="b", top1=92.0, mb=0.5, ms=1.5, params=90_000),
    )
    assert marks(rows) == [{"": "MPSL", "int8_dynamic": "SL"}, {"": "P"}]
    assert [(line[4], line[-1]) for line in int8_table(rows)[1:]] == [
        ("int8_dynamic", "SL"),
        ("int8_weight_only", "-"),
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"model": "vit_tiny"},
        {"top1": None},
        {"more": {"evaluated_images": 100}},
        {"more": {"dataset": {"content": "ff"}}},
        {"more": {"weights": {"source": "trained", "sha256": "ff"}}},
        {"seed": 1, "more": {"weights": {"source": "timm", "sha256": "ff"}}},
    ],
    ids=range(6),
)
def test_other_networks_and_images_are_not_compared(tmp_path: Path, other: dict[str, Any]) -> None:
    first = {"weights": {"source": "trained", "sha256": "ee"}}
    if other.get("more", {}).get("weights", {}).get("source") == "timm":
        first["weights"]["source"] = "timm"
    rows = rows_of(
        finished(tmp_path / "1", more=first),
        finished(tmp_path / "2", **{"method": "a", "more": first, **other}),
    )
    assert comparisons(rows) == []
    assert [line[-1] for line in results_table(rows)[1:]] == ["-", "-"]


def test_networks_trained_from_scratch_may_differ_by_seed(tmp_path: Path) -> None:
    weights = [{"weights": {"source": "trained", "sha256": digest}} for digest in ("ee", "ff")]
    rows = rows_of(
        finished(tmp_path / "1", more=weights[0]),
        finished(tmp_path / "2", method="a", seed=1, more=weights[1]),
    )
    assert len(comparisons(rows)) == 1


def test_latencies_of_other_conditions_are_apart(tmp_path: Path) -> None:
    rows = rows_of(
        finished(tmp_path / "1", method="a", top1=90.0),
        finished(tmp_path / "2", method="b", top1=95.0, ms=1.0, threads=4),
        finished(tmp_path / "3", method="c", top1=80.0, ms=1.0),
        finished(tmp_path / "4", method="d", top1=95.0, ms=0.5, threads=4),
        finished(tmp_path / "5", method="e", top1=70.0, ms=3.0),
    )
    (compared,) = comparisons(rows)
    latencies = [cost for cost in costs_of(compared) if cost.conditions]
    assert [cost.conditions[-1] for cost in latencies] == [2, 4]  # that of most rows first
    assert ["L" in of_row[""] if of_row else False for of_row in marks(rows)] == [
        *(True, False, True, True, False)
    ]


def test_a_figure_for_every_dense_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Figure] = []
    save_figure = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (seen.append(self), save_figure(self, *a, **k))
    )
    int8 = {"int8_dynamic": {"top1": 93.0, "top5": 99.0, "mb": 0.4, "latency_ms": 1.0}}
    rows = rows_of(
        finished(tmp_path / "1", method="$a$", top1=94.0, int8=int8),
        finished(tmp_path / "2", method="b", top1=92.0, mb=0.5, ms=1.5),
        finished(tmp_path / "3", method="c", top1=91.0, model="$x^$", mb=None),
        finished(tmp_path / "4", method="d", top1=90.0, model="$x^$", mb=None),
    )
    pictures = pareto.figures(rows)
    assert list(pictures) == list(pareto.captions(rows)) == ["pareto", "pareto-2"]
    files = rendered(pictures, SCREEN)
    assert list(files) == ["pareto.png", "pareto-2.png"]
    assert all(png.startswith(b"\x89PNG") for png in files.values())
    labels = [[axes.get_xlabel().split("\n")[0] for axes in figure.axes] for figure in seen]
    others = ["MACs per image (M)", "parameters (M)", "latency (ms)"]
    full = [*others[:2], "saved network (MB)", others[2]]
    assert sorted(labels, key=len) == [others, full]
    for figure in seen:
        for axes in figure.axes:
            (step,) = (line for line in axes.get_lines() if line.get_drawstyle() == "steps-post")
            assert step.get_xdata()[-1] == max(step.get_xdata())


def repeats(folder: Path, strength: float = 5.0, *, images: int = 50_000) -> Path:
    """Save a run with the setting of a published row, on so many images."""
    flops = {3.0: 27_508_995_072, 5.0: 22_000_000_000}[strength]
    finished(folder, method="aiminify", model="deit_base", strength=strength, top1=70.0 + strength)
    report = json.loads((folder / "report.json").read_text())
    weights = {"name": WEIGHTS["deit_base"], "source": "timm", "sha256": "ab" * 32}
    report["choices"] |= {"data": "imagefolder", "experiment": "aiminify/deit_base"}
    report["compact"] |= {"params": 67_218_363, "flops": flops, "macs": flops // 2}
    report |= {"weights": weights, "evaluated_images": images}
    report["dataset"] = {"name": "imagefolder", "classes": 1000, "content": "0123456789abcdef"}
    report["overrides"] = ["experiment=aiminify/deit_base", f"strength={strength:g}"]
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def is_open(line: Line2D) -> bool:
    return line.get_markerfacecolor() == "none"


@pytest.mark.parametrize("layout", [SCREEN, *PRINTED.values()], ids=["screen", *PRINTED])
def test_every_point_is_inside_its_frame(tmp_path: Path, layout: Layout) -> None:
    rows = rows_of(
        *(finished(tmp_path / f"a{i}", seed=i, top1=40.0 + 50 * i, macs=200_000) for i in (0, 1)),
        finished(tmp_path / "b", method="b", top1=97.0, macs=9_000_000, mb=40.0, ms=90.0),
    )
    (figure,) = pareto.figures(rows, layout).values()
    render(figure, layout.formats[0])
    assert len(figure.axes) == 4
    for axes in figure.axes:
        (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        bars = [bar for container in axes.containers for bar in container.lines[2]]
        ends = [end for bar in bars for segment in bar.get_segments() for end in segment]
        points = [*ends, *(point for line in axes.get_lines() for point in line.get_xydata())]
        known = [(x, y) for x, y in points if x == x and y == y]
        assert len(known) > 3
        assert all(left < x < right and low < y < high for x, y in known)


def test_published_points_are_drawn_where_the_setting_is_that_of_the_row(tmp_path: Path) -> None:
    rows = rows_of(repeats(tmp_path / "1"), repeats(tmp_path / "2", strength=3.0))
    other = rows_of(repeats(tmp_path / "3", images=100), repeats(tmp_path / "4", 3.0, images=100))
    assert compare.published_points(other) == []
    points = compare.published_points(rows)
    assert [point.top1 for point in points] == [76.23, 74.83]
    (figure,) = pareto.figures(rows).values()
    drawn = [line.get_ydata()[0] for line in figure.axes[1].get_lines() if is_open(line)]
    assert drawn == [76.23, 74.83]
    (figure,) = pareto.figures(other).values()
    assert not [line for axes in figure.axes for line in axes.get_lines() if is_open(line)]


def test_the_command_shows_fronts_in_every_format(tmp_path: Path) -> None:
    finished(tmp_path / "1", method="a", top1=94.0, model="x*y*")
    finished(tmp_path / "2", method="b", top1=92.0, model="x*y*", ms=1.0)
    main([str(tmp_path), "--html", *NO_WANDB])
    report = tmp_path / "report"
    text, page = ((report / name).read_text() for name in ("report.md", "report.html"))
    assert "](pareto.png)" in text
    assert r"Pareto fronts of x\*y\* on digits" in text
    assert text.count(" front |") == 1
    assert "<figcaption>Pareto fronts of x*y* on digits" in page


def test_a_size_that_is_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(tmp_path / "1")
    report = json.loads((folder / "report.json").read_text())
    report["compact"]["mb"] = "much"
    (folder / "report.json").write_text(json.dumps(report))
    assert "wrong type: compact.mb" in failure(capsys, str(tmp_path))

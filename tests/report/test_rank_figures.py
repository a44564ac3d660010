"""The mixed-rank paper's figures: what is drawn from which runs, and what is refused."""

from __future__ import annotations

import io
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reports import NO_WANDB, failure, save
from vitrim.cli.report import main
from vitrim.method.mixed_rank.metric import curves
from vitrim.network.decompose import decompose
from vitrim.plan import MAX_BYTES, Plan, PlanError, dumps, loads
from vitrim.report.rank_figures import (
    Line,
    energy_charts,
    error_charts,
    figures,
    rank_rows,
    read_curves,
)
from vitrim.report.summary import read, summarise

CURVE = {
    "rank": [1, 2, 4],
    "energy": [0.5, 0.75, 1.0],
    "error": [0.5, 0.25, 0.0],
    "plain_error": [0.75, 0.5, 0.0],
}
MATRICES = ("attn.qkv", "attn.proj", "mlp.fc1")
EVERY = {f"blocks.{i}.{matrix}": CURVE for i, matrix in product(range(12), MATRICES)}


def leave(folder: Path, found: Any, **provenance: object) -> Path:
    """Save a plan with these curves in the folder of a run."""
    plan = Plan(model={}, edits=(), provenance={"curves": found, **provenance})
    (folder / "plan.json").write_text(dumps(plan))
    return folder


def traced(folder: Path, found: Any = EVERY, *, series: str = "a", **choices: object) -> Path:
    save(folder, **{"method": "mixed_rank", **choices})
    report = json.loads((folder / "report.json").read_text())
    report["series"] = f"vit_digits-digits-mixed_rank-{series}"
    (folder / "report.json").write_text(json.dumps(report))
    return leave(folder, found, decomposition="loss")


def left_by(*folders: Path) -> list[Any]:
    return [read_curves(read(folder)) for folder in folders]


def size_of(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 100
        return image.size


def test_energy_of_the_first_block_with_curves(tmp_path: Path) -> None:
    found = {name: CURVE for name in EVERY if not name.startswith(("blocks.0.", "blocks.1."))}
    (chart,) = energy_charts(left_by(traced(tmp_path / "run", {**found, "head": CURVE})))
    assert chart.title == "vit_digits on digits, seed 0: blocks.2"
    lines = [Line(matrix, [25, 50, 100], [50, 75, 100]) for matrix in sorted(MATRICES)]
    assert chart.lines == lines


def test_errors_of_three_projections(tmp_path: Path) -> None:
    (chart,) = error_charts(left_by(traced(tmp_path / "run")))
    assert chart.title == "mixed_rank: loss, seed 0"
    names = [f"blocks.{i}.attn.proj" for i in (0, 6, 11)]
    assert [(line.label, line.reference) for line in chart.lines] == [
        *product(names, (False, True))
    ]
    assert chart.lines[0] == Line(names[0], [1, 2, 4], [0.5, 0.25, 0.0])
    assert chart.lines[1].y == [0.75, 0.5, 0.0]


@pytest.mark.parametrize(("n_blocks", "picked"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2])])
def test_errors_of_few_blocks(tmp_path: Path, n_blocks: int, picked: list[int]) -> None:
    found = {f"blocks.{i}.attn.proj": CURVE for i in range(n_blocks)}
    (chart,) = error_charts(left_by(traced(tmp_path / "run", found)))
    assert [line.label for line in chart.lines if line.reference] == [
        f"blocks.{i}.attn.proj" for i in picked
    ]


def test_no_projection_no_errors(tmp_path: Path) -> None:
    found = left_by(traced(tmp_path / "run", {"blocks.0.mlp.fc1": CURVE}))
    assert error_charts(found) == []
    assert [line.label for line in energy_charts(found)[0].lines] == ["mlp.fc1"]


def test_a_chart_per_series_and_energies_once_per_network(tmp_path: Path) -> None:
    other = {name: {**CURVE, "error": [0.9, 0.5, 0.0]} for name in EVERY}
    found = left_by(
        traced(tmp_path / "a1", strength=1.0),
        traced(tmp_path / "a2", strength=2.0),
        traced(tmp_path / "b1", other, series="b"),
        traced(tmp_path / "c1", series="c", model="vit_tiny"),
    )
    assert [chart.title.split(":")[0] for chart in error_charts(found)] == [
        "mixed_rank, vit_digits, a",
        "mixed_rank, vit_digits, b",
        "mixed_rank, vit_tiny",
    ]
    assert [chart.title.split(",")[0] for chart in energy_charts(found)] == [
        "vit_digits on digits",
        "vit_tiny on digits",
    ]


def test_ranks_need_two_points_of_a_series(tmp_path: Path) -> None:
    runs = [
        read(traced(tmp_path / "1", strength=1.0)),
        read(traced(tmp_path / "1-again", strength=1.0, seed=1)),
        read(traced(tmp_path / "none", strength=2.0, top1=None, cut=None)),
        read(traced(tmp_path / "b", series="b", strength=5.0)),
        *(read(save(tmp_path / f"vtp{s}", strength=float(s))) for s in range(3)),
    ]
    assert rank_rows(summarise(runs)) == []
    rows = rank_rows(summarise([*runs, read(traced(tmp_path / "3", strength=3.0))]))
    assert [row.record["strength"] for row in rows] == [1.0, 3.0, 5.0]


@pytest.mark.parametrize(
    ("n_series", "most", "height"), [(1, 12, 1020), (3, 12, 1860), (3, 2, 1020)]
)
def test_pngs_have_room_for_as_many_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_series: int, most: int, height: int
) -> None:
    monkeypatch.setattr("vitrim.report.rank_figures.MAX_CHARTS", most)
    folders = [traced(tmp_path / str(i), series=f"s{i}", seed=i) for i in range(n_series)]
    runs = [read(folder) for folder in folders]
    found = figures(runs, summarise(runs))
    assert {name: size_of(png) for name, png in found.items()} == {
        "energy.png": (2100, height),
        "error.png": (2100, height),
    }


def test_a_place_without_a_chart_stays_empty(tmp_path: Path) -> None:
    runs = [read(traced(tmp_path / str(i), series=f"s{i}")) for i in range(3)]
    with Image.open(io.BytesIO(figures(runs, summarise(runs))["error.png"])) as image:
        corner = image.convert("RGB").crop((1100, 1000, 2100, 1860))
        assert corner.getcolors() == [(1000 * 860, (255, 255, 255))]


def test_the_command_writes_all_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    found = {"blocks.0.attn.proj": curves(weight, decompose(weight, None), None)}
    traced(tmp_path / "1", found, strength=1.0)
    traced(tmp_path / "2", found, strength=2.0)
    main([str(tmp_path), *NO_WANDB])
    names = ("curve.png", "energy.png", "ranks.png", "error.png")
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert said == [str(tmp_path / "report" / name) for name in names]
    sizes = [size_of((tmp_path / "report" / name).read_bytes()) for name in names]
    assert sizes == [(2100, 1020)] * 4


@pytest.mark.parametrize("found", [None, {}, "no plan", "damaged, but not of curves"])
def test_nothing_is_drawn_without_curves(tmp_path: Path, found: object) -> None:
    folder = traced(tmp_path / "run", found)
    if found == "no plan":
        (folder / "plan.json").unlink()
    if found == "damaged, but not of curves":
        (folder / "plan.json").write_text("{")
    assert left_by(folder) == [None]
    main([str(tmp_path), *NO_WANDB])
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == ["curve.png", "report.csv", "report.md"]


@pytest.mark.parametrize(
    "found",
    [
        "much",
        [CURVE],
        {"$\\frac$": CURVE},
        {"": CURVE},
        {"x" * 257: CURVE},
        {"x": None},
        {"x": {key: value for key, value in CURVE.items() if key != "error"}},
        {"x": {**CURVE, "rank": []}},
        {"x": {key: [] for key in CURVE}},
        {"x": {**CURVE, "rank": [1, 2]}},
        {"x": {**CURVE, "rank": [1, 4, 4]}},
        {"x": {**CURVE, "rank": [0, 1, 2]}},
        {"x": {**CURVE, "rank": [1, 2, 2**40]}},
        {"x": {**CURVE, "rank": [1, 2.0, 4]}},
        {"x": {**CURVE, "rank": [True, 2, 4]}},
        {"x": {**CURVE, "rank": {"1": 1}}},
        {"x": {**CURVE, "energy": [0.5, 0.75, 1.5]}},
        {"x": {**CURVE, "energy": [0.5, None, 1.0]}},
        {"x": {**CURVE, "error": [-0.1, 0.0, 0.0]}},
        {"x": {**CURVE, "error": [1e300, 0.0, 0.0]}},
        {"x": {**CURVE, "error": [10**400, 0.0, 0.0]}},
        {"x": {**CURVE, "plain_error": ["a", "b", "c"]}},
        {"x": {**CURVE, "plain_error": [[0.0], [0.0], [0.0]]}},
    ],
)
def test_malformed_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], found: object
) -> None:
    bad = traced(tmp_path / "bad", found)
    message = failure(capsys, str(tmp_path))
    assert str(bad / "plan.json") in message
    assert "provenance.curves: " in message
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "content",
    [
        '{"curves"',
        '{"curves": {}}',
        '["curves"]',
        '"curves"',
        '{"curves": NaN}',
        '{"curves": 1e999}',
        "[" * 100_000 + '"curves"',
        '"curves"\xff\n\n',
        '"curves"' + " " * MAX_BYTES,
    ],
)
def test_a_damaged_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    folder = traced(tmp_path / "run")
    (folder / "plan.json").write_text(content, encoding="latin-1")
    with pytest.raises(PlanError):
        loads(content)
    assert str(folder / "plan.json") in failure(capsys, str(tmp_path))


def test_a_decomposition_is_named_only_if_it_is_a_name(tmp_path: Path) -> None:
    folder = traced(tmp_path / "run")
    for named in (None, 3, "$x$", "two\nlines"):
        leave(folder, EVERY, decomposition=named)
        assert left_by(folder)[0].decomposition == "decomposition"

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
from vitrim.deploy.runfolder import DIAGNOSTICS, read_run
from vitrim.method.mixed_rank.metric import rank_curves
from vitrim.network.decompose import decompose
from vitrim.plan import MAX_BYTES, Plan, PlanError, dumps, loads
from vitrim.report.layout import SCREEN, render, rendered
from vitrim.report.rank_figures import (
    Line,
    energy_charts,
    error_charts,
    figures,
    rank_rows,
    read_curves,
)
from vitrim.report.summary import summarise

CURVE = {
    "rank": [1, 2, 4],
    "energy": [0.5, 0.75, 1.0],
    "error": [0.5, 0.25, 0.0],
    "plain_error": [0.75, 0.5, 0.0],
}
MATRICES = ("attn.qkv", "attn.proj", "mlp.fc1")
EVERY = {f"blocks.{i}.{matrix}": CURVE for i, matrix in product(range(12), MATRICES)}


def leave(folder: Path, curves: Any, *, in_plan: bool = False, **notes: object) -> Path:
    """Save these curves in the folder of a run, or in its plan, as version 0.1.0 did."""
    provenance = {"curves": curves, **notes} if in_plan else notes
    (folder / "plan.json").write_text(dumps(Plan(model={}, edits=(), provenance=provenance)))
    if not in_plan:
        (folder / DIAGNOSTICS).write_text(json.dumps({"curves": curves}, sort_keys=True))
    return folder


def with_curves(
    folder: Path,
    curves: Any = EVERY,
    *,
    series: str = "a",
    in_plan: bool = False,
    **choices: object,
) -> Path:
    save(folder, **{"method": "mixed_rank", **choices})
    report = json.loads((folder / "report.json").read_text())
    report["series"] = f"vit_digits-digits-mixed_rank-{series}"
    (folder / "report.json").write_text(json.dumps(report))
    return leave(folder, curves, in_plan=in_plan, decomposition="loss")


def curves_of(*folders: Path) -> list[Any]:
    return [read_curves(read_run(folder)) for folder in folders]


def size_of(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 100
        return image.size


def test_curves_in_the_plan_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    folder = with_curves(tmp_path / "run")
    earlier = with_curves(tmp_path / "earlier", in_plan=True)
    assert not (earlier / DIAGNOSTICS).exists()
    assert curves_of(earlier) == curves_of(folder)
    (run,) = curves_of(folder)
    assert (run.decomposition, run.curves) == ("loss", EVERY)


@pytest.mark.parametrize("in_plan", [False, True])
def test_of_several_methods_the_last_with_curves_counts(tmp_path: Path, in_plan: bool) -> None:
    folder = save(tmp_path / "run", method="mixed_rank")
    one, two = ({"decomposition": name} for name in ("weights", "loss"))
    three: dict[str, object] = {}
    if in_plan:
        one, two = {**one, "curves": {"a": CURVE}}, {**two, "curves": EVERY}
        three = {"method": "transfer"}
    else:
        (folder / DIAGNOSTICS).write_text(json.dumps({"curves": EVERY}))
    steps = [one, two, *([three] if three else [])]
    plan = Plan(model={}, edits=(), provenance={"steps": steps, "seed": 0})
    (folder / "plan.json").write_text(dumps(plan))
    (run,) = curves_of(folder)
    assert (run.decomposition, run.curves) == ("loss", EVERY)


def test_energy_of_the_first_block_with_curves(tmp_path: Path) -> None:
    curves = {name: CURVE for name in EVERY if not name.startswith(("blocks.0.", "blocks.1."))}
    (chart,) = energy_charts(curves_of(with_curves(tmp_path / "run", {**curves, "head": CURVE})))
    assert chart.title == "vit_digits on digits, seed 0: blocks.2"
    lines = [Line(matrix, [25, 50, 100], [50, 75, 100]) for matrix in sorted(MATRICES)]
    assert chart.lines == lines


def test_errors_of_three_projections(tmp_path: Path) -> None:
    (chart,) = error_charts(curves_of(with_curves(tmp_path / "run")))
    assert chart.title == "mixed_rank: loss, seed 0"
    names = [f"blocks.{i}.attn.proj" for i in (0, 6, 11)]
    assert [(line.label, line.reference) for line in chart.lines] == [
        *product(names, (False, True))
    ]
    assert chart.lines[0] == Line(names[0], [1, 2, 4], [0.5, 0.25, 0.0])
    assert chart.lines[1].y == [0.75, 0.5, 0.0]


@pytest.mark.parametrize(("n_blocks", "picked"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2])])
def test_errors_of_few_blocks(tmp_path: Path, n_blocks: int, picked: list[int]) -> None:
    curves = {f"blocks.{i}.attn.proj": CURVE for i in range(n_blocks)}
    (chart,) = error_charts(curves_of(with_curves(tmp_path / "run", curves)))
    assert [line.label for line in chart.lines if line.reference] == [
        f"blocks.{i}.attn.proj" for i in picked
    ]


def test_no_projection_no_errors(tmp_path: Path) -> None:
    curves = curves_of(with_curves(tmp_path / "run", {"blocks.0.mlp.fc1": CURVE}))
    assert error_charts(curves) == []
    assert [line.label for line in energy_charts(curves)[0].lines] == ["mlp.fc1"]


def test_a_chart_per_series_and_energies_once_per_network(tmp_path: Path) -> None:
    other = {name: {**CURVE, "error": [0.9, 0.5, 0.0]} for name in EVERY}
    curves = curves_of(
        with_curves(tmp_path / "a1", strength=1.0),
        with_curves(tmp_path / "a2", strength=2.0),
        with_curves(tmp_path / "b1", other, series="b"),
        with_curves(tmp_path / "c1", series="c", model="vit_tiny"),
    )
    assert [chart.title.split(":")[0] for chart in error_charts(curves)] == [
        "mixed_rank, vit_digits, a",
        "mixed_rank, vit_digits, b",
        "mixed_rank, vit_tiny",
    ]
    assert [chart.title.split(",")[0] for chart in energy_charts(curves)] == [
        "vit_digits on digits",
        "vit_tiny on digits",
    ]


def test_ranks_need_two_points_of_a_series(tmp_path: Path) -> None:
    runs = [
        read_run(with_curves(tmp_path / "1", strength=1.0)),
        read_run(with_curves(tmp_path / "1-again", strength=1.0, seed=1)),
        read_run(with_curves(tmp_path / "none", strength=2.0, top1=None, cut=None)),
        read_run(with_curves(tmp_path / "b", series="b", strength=5.0)),
        *(read_run(save(tmp_path / f"vtp{s}", strength=float(s))) for s in range(3)),
    ]
    assert rank_rows(summarise(runs)) == []
    rows = rank_rows(summarise([*runs, read_run(with_curves(tmp_path / "3", strength=3.0))]))
    assert [row.record["strength"] for row in rows] == [1.0, 3.0, 5.0]


@pytest.mark.parametrize(
    ("n_series", "most", "height"), [(1, 12, 1020), (3, 12, 1860), (3, 2, 1020)]
)
def test_pngs_have_room_for_as_many_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_series: int, most: int, height: int
) -> None:
    monkeypatch.setattr("vitrim.report.rank_figures.MAX_CHARTS", most)
    folders = [with_curves(tmp_path / str(i), series=f"s{i}", seed=i) for i in range(n_series)]
    runs = [read_run(folder) for folder in folders]
    pictures = figures(runs, summarise(runs))
    assert {name: size_of(png) for name, png in rendered(pictures, SCREEN).items()} == {
        "energy.png": (2100, height),
        "error.png": (2100, height),
    }


def test_a_place_without_a_chart_stays_empty(tmp_path: Path) -> None:
    runs = [read_run(with_curves(tmp_path / str(i), series=f"s{i}")) for i in range(3)]
    with Image.open(io.BytesIO(render(figures(runs, summarise(runs))["error"]))) as image:
        corner = image.convert("RGB").crop((1100, 1000, 2100, 1860))
        assert corner.getcolors() == [(1000 * 860, (255, 255, 255))]


def test_the_command_writes_all_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    curves = {"blocks.0.attn.proj": rank_curves(weight, decompose(weight, None), None)}
    with_curves(tmp_path / "1", curves, strength=1.0)
    with_curves(tmp_path / "2", curves, strength=2.0)
    main([str(tmp_path), *NO_WANDB])
    names = ("curve.png", "pareto.png", "energy.png", "ranks.png", "error.png")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.endswith(".png")]
    assert printed == [str(tmp_path / "report" / name) for name in names]
    sizes = [size_of((tmp_path / "report" / name).read_bytes()) for name in names]
    assert sizes == [(2100, 1680), (2100, 1800), (2100, 1020), (2100, 1680), (2100, 1020)]


@pytest.mark.parametrize("in_plan", [False, True])
@pytest.mark.parametrize("curves", [None, {}, "no files", "damaged, without curves"])
def test_nothing_is_drawn_without_curves(tmp_path: Path, curves: object, in_plan: bool) -> None:
    folder = with_curves(tmp_path / "run", curves, in_plan=in_plan)
    if curves == "no files":
        (folder / "plan.json").unlink()
        (folder / DIAGNOSTICS).unlink(missing_ok=True)
    if curves == "damaged, without curves":
        (folder / "plan.json").write_text("{")
        (folder / DIAGNOSTICS).unlink(missing_ok=True)
    assert curves_of(folder) == [None]
    main([str(tmp_path), *NO_WANDB])
    names = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert names == ["curve.png", "report.csv", "report.md"]


@pytest.mark.parametrize("in_plan", [False, True])
@pytest.mark.parametrize(
    "curves",
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], curves: object, in_plan: bool
) -> None:
    bad = with_curves(tmp_path / "bad", curves, in_plan=in_plan)
    message = failure(capsys, str(tmp_path))
    where = "plan.json: provenance.curves: " if in_plan else f"{DIAGNOSTICS}: curves: "
    assert f"{bad}/{where}" in message
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
    folder = with_curves(tmp_path / "run", in_plan=True)
    (folder / "plan.json").write_text(content, encoding="latin-1")
    with pytest.raises(PlanError):
        loads(content)
    assert str(folder / "plan.json") in failure(capsys, str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"curves": NaN}', "[" * 100_000])
def test_damaged_diagnostics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    folder = with_curves(tmp_path / "run")
    (folder / DIAGNOSTICS).write_text(content)
    assert str(folder / DIAGNOSTICS) in failure(capsys, str(tmp_path))


def test_a_decomposition_is_named_only_if_it_is_a_name(tmp_path: Path) -> None:
    folder = with_curves(tmp_path / "run")
    for name in (None, 3, "$x$", "two\nlines"):
        leave(folder, EVERY, decomposition=name)
        assert curves_of(folder)[0].decomposition == "decomposition"

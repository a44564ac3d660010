from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reports import NO_WANDB, document, failure, save
from vitrim.cli.report import main
from vitrim.deploy.runfolder import Run, read_run
from vitrim.plan import Plan, dumps
from vitrim.report.compare import comparison
from vitrim.report.figure import draw, labelled, panels
from vitrim.report.layout import PRINTED, SCREEN, Layout, render
from vitrim.report.summary import Row, Spread, per_seed, spread_of, summarise
from vitrim.report.tables import int8_table
from vitrim.report.tracked import numbers


def rows_of(*choices: dict[str, Any], tmp_path: Path) -> list[Row]:
    folders = [save(tmp_path / f"run{i}", **chosen) for i, chosen in enumerate(choices)]
    return summarise([read_run(folder) for folder in folders])


def markdown_table(root: Path) -> list[dict[str, str]]:
    lines = (root / "report" / "report.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return [dict(zip(cells[0], line, strict=True)) for line in cells[2:]]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with two methods, three strengths and two seeds, and an unfinished run."""
    root = tmp_path_factory.mktemp("sweep")
    for method in ("vtp", "mixed_rank"):
        for strength in (0.0, 2.5, 5.0):
            for seed in (0, 1):
                save(
                    root / method / f"s{strength:g}-seed{seed}",
                    method=method,
                    strength=strength,
                    target={"metric": "units", "keep": 1 - strength / 10},
                    seed=seed,
                    top1=98.0 - strength + seed,
                    cut=98.0 - 16 * strength,
                    macs=10_000_000 - int(strength * 1_000_000),
                )
    (root / "vtp" / "s4-seed0").mkdir()
    (root / "vtp" / "s4-seed0" / "recipe.yaml").write_text("seed: 0\n")
    return root


@pytest.fixture(scope="module")
def printed(sweep: Path) -> list[str]:
    """Return what the command prints of the sweep, whose report it writes."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main([str(sweep), *NO_WANDB])
    return output.getvalue().splitlines()


def test_spread_of_known_numbers() -> None:
    assert spread_of([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == Spread(5.0, math.sqrt(32 / 7), 8)


def test_spread_of_one_value_has_no_deviation() -> None:
    assert spread_of([90.0, None]) == Spread(90.0, None, 1)


def test_spread_of_nothing() -> None:
    assert spread_of([None, None]) is None


def test_a_seed_that_ran_twice_counts_once() -> None:
    records = [{"seed": 0, "x": 1.0}, {"seed": 0, "x": 3.0}, {"seed": 1, "x": 5.0}]
    assert per_seed([*records, {"seed": 2, "x": None}], "x") == [2.0, 5.0]


def test_delta_is_paired_by_seed(tmp_path: Path) -> None:
    pairs = ((90.0, 95.0), (92.0, 99.0), (None, 80.0))
    choices = [{"seed": i, "top1": a, "dense": b} for i, (a, b) in enumerate(pairs)]
    (row,) = rows_of(*choices, tmp_path=tmp_path)
    assert row.spreads["delta"] == Spread(-6.0, math.sqrt(2), 2)
    assert row.spreads["compact.top1"] == Spread(91.0, math.sqrt(2), 2)


def in_int8(folder: Path, **measured: object) -> None:
    path = folder / "report.json"
    report = json.loads(path.read_text())
    int8 = {"top1": 89.0, "top5": 99.0, "mb": 0.25, "latency_ms": 1.0, **measured}
    quantized = {"int8_dynamic": int8}
    path.write_text(json.dumps({**report, "float_mb": 1.0, "quantized": quantized}))


def test_int8_rows_are_in_a_table_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, (top1, int8) in enumerate(((90.0, 89.0), (94.0, 92.0))):
        in_int8(save(tmp_path / str(seed), seed=seed, top1=top1), top1=int8)
    save(tmp_path / "float", method="aiminify")
    rows = summarise([read_run(tmp_path / name) for name in ("0", "1", "float")])
    cells = ["vtp", "vit_digits", "digits", "3", "int8_dynamic", "1.000", "0.2500", "92.00"]
    cells += ["90.50 ± 2.12", "2", "-1.50", "99.00", "2.00 -> 1.00 (2.00x)", "L"]
    assert int8_table(rows)[1:] == [cells]
    assert int8_table([row for row in rows if row.record["label"] == "aiminify"]) == []
    head, *values = numbers(rows)
    accuracies = [
        dict(zip(head, line, strict=True))["quantized.int8_dynamic.top1"] for line in values
    ]
    assert accuracies == [None, 90.5]
    main([str(tmp_path), *NO_WANDB])
    assert capsys.readouterr().out.count("int8_dynamic") == 1
    assert f"| {' | '.join(cells)} |" in (tmp_path / "report" / "report.md").read_text()


def test_int8_rows_without_images(tmp_path: Path) -> None:
    run = save(tmp_path / "run", top1=None, cut=None, dense=None)
    in_int8(run, top1=None, top5=None, latency_ms=None)
    (line,) = int8_table(summarise([read_run(run)]))[1:]
    assert line[-7:] == ["-", "-", "1", "-", "-", "-", "-"]


def test_exports_in_static_int8_have_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save(tmp_path / "run")
    path = run / "export" / "onnx" / "int8.json"
    path.parent.mkdir(parents=True)
    sides = {
        name: {"top1": top1, "top5": 99.0, "mb": mb, "latency_ms": ms}
        for name, top1, mb, ms in (("float", 90.0, 2.0, 8.0), ("int8", 89.5, 0.5, 2.0))
    }
    path.write_text(json.dumps({"format": 1, **sides}))
    (line,) = int8_table(summarise([read_run(run)]))[1:]
    assert line[4:] == [
        *("onnx_int8_static", "2.000", "0.5000", "90.00", "89.50", "1", "-0.50", "99.00"),
        "8.00 -> 2.00 (4.00x)",
        "-",
    ]
    path.write_text("[]")
    assert "expected what was measured in float and in int8" in failure(capsys, str(tmp_path))


def test_malformed_int8_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_int8(save(tmp_path / "bad"), mb="much")
    assert "wrong type: quantized.int8_dynamic.mb" in failure(capsys, str(tmp_path))


def test_latency_is_not_averaged_over_machines(tmp_path: Path) -> None:
    runs = [read_run(save(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    other = Run(runs[1].folder, {**runs[1].record, "latency.device": "cuda"})
    assert summarise(runs)[0].mean("compact.latency_ms") == 2.0
    assert summarise([runs[0], other])[0].mean("compact.latency_ms") is None


def test_rows_are_sorted_by_series_then_strength_then_target(tmp_path: Path) -> None:
    by_macs = [{"strength": None, "target": {"metric": "macs", "keep": k}} for k in (0.3, 0.6)]
    strengths = [{"strength": strength} for strength in (10 / 4, 0, 1)]
    first = {"method": "apart", "strength": 5}
    rows = rows_of(*by_macs, *strengths, first, tmp_path=tmp_path)
    budgets = [(row.record["strength"], row.record["target.keep"]) for row in rows]
    assert budgets == [(5, 0.7), (0, 0.7), (1, 0.7), (2.5, 0.7), (None, 0.6), (None, 0.3)]


@pytest.mark.usefixtures("printed")
def test_markdown_table(sweep: Path) -> None:
    rows = markdown_table(sweep)
    assert [(row["method"], row["strength"]) for row in rows] == [
        (method, strength) for method in ("mixed_rank", "vtp") for strength in ("0", "2.5", "5")
    ]
    assert rows[4] == {
        "method": "vtp",
        "model": "vit_digits",
        "data": "digits",
        "strength": "2.5",
        "kept MACs %": "75.0",
        "params M": "0.1235",
        "MACs M": "7.500",
        "top-1 dense": "98.00",
        "top-1 cut": "58.00",
        "top-1 final": "96.00 ± 0.71",
        "n": "2",
        "delta": "-2.00",
        "top-5": "99.50",
        "latency ms": "4.00 -> 2.00 (2.00x)",
        "front": "M",
    }
    text = (sweep / "report" / "report.md").read_text()
    assert "1 cpu fp32 2" in text
    assert "abc False" in text
    assert "12 finished; 1 unfinished" in text


def test_printed_output(sweep: Path, printed: list[str]) -> None:
    split = printed.index("unfinished: 1")
    table = printed[:split]
    assert max(map(len, table)) <= 100
    assert table[0] == "vit_digits on digits"
    assert sum("96.00 ± 0.71" in line for line in table) == 2
    assert printed[split + 1] == f"  {sweep / 'vtp' / 's4-seed0'}: unfinished"
    names = ("curve.png", "pareto.png", "ranks.png", "report.md", "report.csv")
    assert printed[split + 2 : split + 7] == [str(sweep / "report" / name) for name in names]
    assert printed[-1] == f"{sweep / 'vtp' / 's5-seed1'}  strength=5 seed=1"
    assert len(printed) == split + 7 + 12


def test_gigamacs_for_large_nets(tmp_path: Path) -> None:
    large = document()
    large["dense"]["macs"], large["compact"]["macs"] = 17_563_828_224, 9_000_000_000
    save(tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text(json.dumps(large))
    main([str(tmp_path), *NO_WANDB])
    assert markdown_table(tmp_path)[0]["MACs G"] == "9.000"


@pytest.mark.usefixtures("printed")
def test_csv_has_every_number_in_full(sweep: Path) -> None:
    with (sweep / "report" / "report.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    assert list(lines[0]) == ["folder", *sorted(set(lines[0]) - {"folder"})]
    for line in lines:
        record = read_run(Path(line["folder"])).record
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                assert type(value)(line[key]) == value
        assert float(line["seconds.total"]) == 1 / 3
        assert line["choices.experiment"] == ""


@pytest.mark.usefixtures("printed")
def test_png_is_fit_for_print(sweep: Path) -> None:
    with Image.open(sweep / "report" / "curve.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width >= 1500
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert len(image.convert("RGB").getcolors(2**24) or ()) > 100


def test_the_same_runs_give_the_same_files(sweep: Path) -> None:
    names = ("curve.png", "pareto.png", "ranks.png", "report.md", "report.csv")
    main([str(sweep), *NO_WANDB])
    first = [(sweep / "report" / name).read_bytes() for name in names]
    main([str(sweep), *NO_WANDB])
    assert [(sweep / "report" / name).read_bytes() for name in names] == first
    assert sorted(path.name for path in (sweep / "report").iterdir()) == sorted(names)


def test_null_accuracies_become_dashes(tmp_path: Path) -> None:
    for strength in (0.0, 5.0):
        save(tmp_path / f"s{strength}", strength=strength, top1=None, cut=None, dense=None)
    main([str(tmp_path), *NO_WANDB])
    for row in markdown_table(tmp_path):
        columns = ("top-1 dense", "top-1 cut", "top-1 final", "delta", "top-5")
        assert {row[column] for column in columns} == {"-"}
        assert row["n"] == "1"
    rows = summarise([read_run(tmp_path / "s0.0"), read_run(tmp_path / "s5.0")])
    assert [(panel.x, panel.y) for panel in panels(rows)] == [
        ("strength", "kept_macs"),
        ("strength", "kept_params"),
    ]


def test_runs_by_target_appear_only_against_macs(tmp_path: Path) -> None:
    budget = {"strength": None, "target": {"metric": "macs", "keep": 0.6}}
    rows = rows_of(budget, {"strength": 0.0}, tmp_path=tmp_path)
    assert [panel.x for panel in panels(rows)] == ["strength", "compact.macs"]
    assert rows[1].mean("strength") is None
    assert [panel.x for panel in panels(rows[1:])] == ["compact.macs"]
    main([str(tmp_path), *NO_WANDB])
    assert [row["strength"] for row in markdown_table(tmp_path)] == ["0", "macs=0.6"]


@pytest.mark.parametrize("accuracy", [None, 90.0])
def test_a_figure_of_targets_only(tmp_path: Path, accuracy: float | None) -> None:
    same = {"strength": None, "top1": accuracy, "cut": None, "dense": None}
    targets = [{**same, "target": {"metric": "macs", "keep": keep}} for keep in (0.6, 0.3)]
    assert render(draw(rows_of(*targets, tmp_path=tmp_path))).startswith(b"\x89PNG")


def test_rows_without_accuracy_are_no_part_of_a_figure_of_accuracies(tmp_path: Path) -> None:
    rows = rows_of({}, {"method": "aiminify", "top1": None}, tmp_path=tmp_path)
    drawn = [row for row in rows if row.mean("compact.top1") is not None]
    assert render(draw(rows)) == render(draw(drawn))


def test_labels_tell_series_apart(tmp_path: Path) -> None:
    rows = rows_of({}, {"method": "mixed_rank"}, {"strength": 1.0}, tmp_path=tmp_path)
    assert {label: len(part) for label, part in labelled(rows).items()} == {
        "mixed_rank": 1,
        "vtp": 2,
    }
    other = Row({**rows[0].record, "series": "vit_digits-digits-mixed_rank-0000"}, rows[0].spreads)
    assert list(labelled([rows[0], other])) == ["mixed_rank, 9f8e7d6c", "mixed_rank, 0000"]
    large = Row({**rows[0].record, "series": "x", "choices.model": "vit_b"}, rows[0].spreads)
    assert list(labelled([rows[0], large])) == ["mixed_rank, vit_digits", "mixed_rank, vit_b"]


@pytest.mark.parametrize("layout", [SCREEN, *PRINTED.values()], ids=["screen", *PRINTED])
@pytest.mark.parametrize("cut", [None, 10.0, 85.0])
def test_no_point_leaves_the_frame(tmp_path: Path, layout: Layout, cut: float | None) -> None:
    seeds = [{"seed": i, "top1": top1, "cut": cut} for i, top1 in enumerate((90.0, 80.0))]
    strong = {"strength": 5.0, "top1": 60.0, "cut": cut and cut / 2, "macs": 1_000_000}
    figure = draw(rows_of(*seeds, strong, tmp_path=tmp_path), layout=layout)
    render(figure, layout.formats[0])
    assert len(figure.axes) == (2 if cut is None else 4)
    for axes in figure.axes:
        (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        assert axes.get_yscale() == "linear"
        bars = [bar for container in axes.containers for bar in container.lines[2]]
        ends = [segment for bar in bars for segment in bar.get_segments() if len(segment)]
        lines = [line.get_xydata() for line in axes.get_lines() if line.get_linestyle() != "--"]
        dense = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
        points = [[x, y] for part in (*ends, *lines) for x, y in part if y == y]
        assert len(points) > 1
        assert dense
        assert all(left < x < right and low < y < high for x, y in points)
        assert all(low < line.get_ydata()[0] < high for line in dense)


def test_values_for_wandb_are_not_rounded(tmp_path: Path) -> None:
    seeds = [{"seed": i, "top1": top1} for i, top1 in enumerate((90.0, 90.1, 90.3))]
    head, values = numbers(rows_of(*seeds, tmp_path=tmp_path))
    line = dict(zip(head, values, strict=True))
    assert line["compact.top1"] == pytest.approx(270.4 / 3, abs=1e-12)
    assert line["n"] == 3
    assert line["compact.macs"] == 6_000_000


def test_reports_in_phases_are_not_read(tmp_path: Path) -> None:
    save(tmp_path / "run")
    save(tmp_path / "phases" / "dense", method="foreign")
    main([str(tmp_path), *NO_WANDB])
    assert [row["method"] for row in markdown_table(tmp_path)] == ["vtp"]


def test_overlapping_roots_count_a_run_once(tmp_path: Path) -> None:
    save(tmp_path / "a" / "run")
    main([str(tmp_path), str(tmp_path / "a"), "--out", str(tmp_path / "there"), *NO_WANDB])
    assert len(markdown_table(tmp_path / "there")) == 1
    assert len((tmp_path / "there" / "report" / "report.csv").read_text().splitlines()) == 2
    assert not (tmp_path / "report").exists()


def test_no_report_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    message = failure(capsys, str(tmp_path))
    assert str(tmp_path) in message
    assert "`vitrim`" in message
    assert "1 unfinished" in message
    assert not (tmp_path / "report").exists()


def test_no_such_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path / 'absent'}: no such folder" in failure(capsys, str(tmp_path / "absent"))


BAD = [
    ("{", "no valid JSON"),
    ("[" * 100_000, "no valid JSON"),
    (" " * 2**22 + json.dumps(document()), "no valid JSON"),
    ("9" * 5000, "no valid JSON"),
    ("[]", "format=None: expected 1"),
    ('{"format": 2}', "format=2: expected 1"),
    ('{"format": 1, "seed": NaN}', "NaN is no number"),
    ('{"format": 1}', "missing or of a wrong type: choices.method, choices.model"),
    (json.dumps({**document(), "seed": True}), "wrong type: seed"),
    (json.dumps({**document(), "strength": "3"}), "wrong type: strength"),
    (json.dumps({**document(), "cut": None}), "wrong type: cut.top1"),
    (json.dumps({**document(), "latency": {"batch": [1]}}), "wrong type: latency.batch"),
    (json.dumps(document()).replace('"seed": 0', '"seed": -1'), "out of range"),
    (json.dumps(document()).replace('"seed": 0', f'"seed": 1{"0" * 400}'), "out of range"),
    (json.dumps(document()).replace("98.0", "1e999"), "dense.top1"),
    (json.dumps(document(top1=101.0)), "compact.top1"),
    (json.dumps(document(strength=1e300)), "strength"),
    (json.dumps(document(method="\x1b[2J")), "no plain text: choices.method"),
    (json.dumps(document(model="x" * 501)), "no plain text: choices.model"),
    (json.dumps({**document(), "\x1b[2J": 1}), r"no plain text: \x1b[2J"),
]


@pytest.mark.parametrize(("content", "problem"), BAD, ids=range(len(BAD)))
def test_a_malformed_report_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, problem: str
) -> None:
    save(tmp_path / "bad")
    (tmp_path / "bad" / "report.json").write_text(content)
    message = failure(capsys, str(tmp_path))
    assert str(tmp_path / "bad" / "report.json") in message
    assert problem in message
    assert not (tmp_path / "report").exists()


def test_what_is_malformed_is_omitted_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bad", "good", "worse"):
        save(tmp_path / name)
    (tmp_path / "bad" / "report.json").write_text("{}")
    curves = dumps(Plan(model={}, edits=(), provenance={"curves": "much"}))
    (tmp_path / "worse" / "plan.json").write_text(curves)
    main([str(tmp_path), *NO_WANDB])
    out, err = capsys.readouterr()
    problems = [line.partition(": ")[2] for line in err.splitlines()]
    assert problems[0].startswith(f"omitted: {tmp_path / 'bad' / 'report.json'}: format=None")
    assert problems[1].startswith(f"omitted: {tmp_path / 'worse' / 'plan.json'}: provenance.curves")
    assert len(problems) == 2
    assert out.count("strength=3 seed=0") == 1
    assert len(markdown_table(tmp_path)) == 1


def test_names_are_no_mathematics(tmp_path: Path) -> None:
    names = ("$\\frac{$", "$x^$ & <b>")
    rows = rows_of(*({"method": name} for name in names), tmp_path=tmp_path)
    assert render(draw(rows)).startswith(b"\x89PNG")


def test_a_failing_wandb_does_not_hurt(
    sweep: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise RuntimeError("no disk left")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING, logger="vitrim.report.tracked"):
        main([str(sweep)])
    assert [record.getMessage() for record in caplog.records] == ["W&B: no disk left"]
    assert "seed=1" in capsys.readouterr().out.splitlines()[-1]
    assert len(list((sweep / "report").iterdir())) == 5


def test_offline_wandb_run_is_silent_and_complete(sweep: Path) -> None:
    code = "import sys; from vitrim.cli.report import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, str(sweep), "--to", str(sweep / "to")]  # the former name
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1].endswith("strength=5 seed=1")
    (run,) = (sweep / "to" / "wandb").glob("offline-run-*")
    assert len(list(run.glob("*.wandb"))) == 1
    assert len(list(run.glob("files/media/images/curve_*.png"))) == 1
    (rows,) = run.glob("files/media/table/rows_*.json")
    assert len(json.loads(rows.read_text())["data"]) == 6
    (lines,) = run.glob("files/media/table/strength_top1_*.json")
    assert len(json.loads(lines.read_text())["data"]) == 6


HEAVY = """
import pkgutil, sys
from importlib import import_module
import vitrim.report
names = [module.name for module in pkgutil.iter_modules(vitrim.report.__path__)]
assert len(names) > 8
for name in names:
    import_module(f"vitrim.report.{name}")
import vitrim.cli.report
heavy = ("torch", "timm", "hydra", "omegaconf", "lightning", "matplotlib", "wandb", "rich", "scipy")
print(*[name for name in heavy if name in sys.modules])
"""


def test_import_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("words", [["--nonsense"], ["--wandb", "maybe"], ["--out"]])
def test_a_bad_flag_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "vitrim-report: error: " in capsys.readouterr().err


def test_the_prediction_of_an_earlier_version_has_its_present_name(tmp_path: Path) -> None:
    folder = save(tmp_path / "run")
    predicted = {"latency_ratio": 0.5, "dense_ms": 4.0}
    report = json.loads((folder / "report.json").read_text())
    for key in ("foretold", "predicted_latency"):
        (folder / "report.json").write_text(json.dumps({**report, key: predicted}))
        record = read_run(folder).record
        assert record["predicted_latency.latency_ratio"] == 0.5
        assert not any(name.startswith("foretold") for name in record)


def test_a_published_row_without_a_strength_is_compared_with_ours(tmp_path: Path) -> None:
    target = {"metric": "params", "keep": 22050664}
    no_images = {"top1": None, "cut": None, "dense": None}
    choices = {"method": "mixed_rank", "model": "deit_base", "strength": None, "target": target}
    report = document(**choices, **no_images)
    report["choices"]["experiment"] = "mixed_rank/deit_base_at_small"
    folder = save(tmp_path / "run")
    (folder / "report.json").write_text(json.dumps(report))
    (line,) = comparison(summarise([read_run(folder)]))
    assert line[1].startswith("ImageNet-1K")
    assert line[0] == "mixed_rank/deit_base_at_small"
    assert line[2:4] == ["-", "-"]  # neither images nor a strength

"""Figures for papers: their formats and widths, the tables in LaTeX, and that the files repeat."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nets import MODEL
from reports import NO_WANDB, save
from vitrim import Keep, Plan
from vitrim.cli.report import main
from vitrim.deploy.runfolder import read_run
from vitrim.plan import dumps
from vitrim.report.figure import draw
from vitrim.report.layout import PRINTED, render
from vitrim.report.summary import summarise

PLAN = Plan(model=MODEL, edits=(Keep(site="blocks.0.mlp.hidden", index=tuple(range(12))),))


@pytest.mark.parametrize("width", [*PRINTED])
def test_figures_for_print_have_the_width_of_a_paper(tmp_path: Path, width: str) -> None:
    method = "vtp " + " ".join(f"gating.option_{i}=1e-{i}" for i in range(9))
    rows = summarise([read_run(save(tmp_path / "run", method=method))])
    layout = PRINTED[width]
    svg, again = (render(draw(rows, layout=layout), "svg") for _ in range(2))
    assert svg == again
    size = re.search(r'<svg [^>]*width="([0-9.]+)pt"', svg.decode())
    assert size is not None
    assert float(size[1]) == 72 * layout.width
    figure = draw(rows, layout=layout)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_tables_in_latex(tmp_path: Path) -> None:
    save(tmp_path / "run", method="a_b", model="\\input{x}%", seed=0, top1=90.0)
    save(tmp_path / "again", method="a_b", model="\\input{x}%", seed=1, top1=92.0)
    main([str(tmp_path), "--print", "text", *NO_WANDB])
    text = (tmp_path / "report" / "report.tex").read_text()
    assert "\\input" not in text
    assert "% \\textbackslash{}input\\{x\\}\\% on digits" in text
    (line,) = (line for line in text.splitlines() if line.startswith("a\\_b &"))
    assert "& 91.00 $\\pm$ 1.41 & 2 &" in line
    assert line.endswith("\\\\")
    names = {f"curve.{suffix}" for suffix in ("png", "pdf", "svg")}
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == names | {"report.md", "report.csv", "report.tex"}
    assert (tmp_path / "report" / "curve.pdf").read_bytes().startswith(b"%PDF")
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 1


def test_other_widths_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print", "poster"])
    assert "'text', 'column'" in capsys.readouterr().err.replace("text, column", "'text', 'column'")


def test_the_page_has_the_macs_of_every_block_only_where_they_are_known(tmp_path: Path) -> None:
    folder = save(tmp_path / "run")  # its MACs are not those of the plan's network
    (folder / "plan.json").write_text(dumps(PLAN))
    main([str(tmp_path), "--html", *NO_WANDB])
    assert not (tmp_path / "report" / "blocks.png").exists()

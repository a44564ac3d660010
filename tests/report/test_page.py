from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from conftest import MODEL
from reports import NO_WANDB, save
from vitrim import Drop, Keep, LowRank, Plan
from vitrim.cli.report import main
from vitrim.plan import dumps
from vitrim.report.heatmap import Cell, heatmap

EVIL = "<script>document.title='owned'</script>\"&'"
PLAN = Plan(
    model=MODEL,
    edits=(
        Keep(site="blocks.0.mlp.hidden", index=tuple(range(12))),
        LowRank(linear="blocks.0.attn.proj", rank=6),
        Drop(branch="blocks.1.attn"),
    ),
)
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Tags in order, addresses, and whether every tag that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def publish(root: Path) -> Path:
    """Return the page of a run with a plan, one with a bad plan and three unfinished ones."""
    folder = save(root / "a series" / "s3-seed0")
    (folder / "plan.json").write_text(dumps(PLAN))
    other = save(root / "a series" / "s4-seed0", strength=4.0, method=EVIL)
    (other / "plan.json").write_text(json.dumps({"format": EVIL}))
    for name, status in (
        ("failed", json.dumps({"status": "FAILED", "reason": EVIL})),
        ("odd", "[]"),
        ("plain", None),
    ):
        (root / "a series" / name).mkdir()
        (root / "a series" / name / "recipe.yaml").write_text("seed: 0\n")
        if status is not None:
            (root / "a series" / name / "status.json").write_text(status)
    main([str(root), "--html", *NO_WANDB])
    return root / "report" / "report.html"


def test_the_page_needs_no_other_file_and_its_links_lead_to_the_runs(tmp_path: Path) -> None:
    page = publish(tmp_path)
    parsed = Page(page.read_text())
    assert {"script", "style"} & {*parsed.tags} == {"style"}
    data = [address for address in parsed.addresses if address.startswith("data:")]
    links = [address for address in parsed.addresses if not address.startswith("data:")]
    assert sum(address.startswith("data:image/png;base64,") for address in data) == 2
    assert len(links) == 3 + 2 * 4
    assert all((page.parent / unquote(link)).exists() for link in links)
    assert not re.search(r"url\(|@import|https?:", page.read_text())


def test_what_others_wrote_is_escaped(tmp_path: Path) -> None:
    text = publish(tmp_path).read_text()
    assert "<script>" not in text
    assert text.count("&lt;script&gt;document.title=&#39;owned&#39;&lt;/script&gt;&#34;&amp;") >= 4


def test_unfinished_runs_are_listed_with_what_is_known_of_them(tmp_path: Path) -> None:
    text, _, _ = publish(tmp_path).read_text().partition("<h2>Results</h2>")
    listed = re.findall(r'<td class="text[ bad]*">([^<]*)</td><td class="text">([^<]*)</td>', text)
    assert [status for status, _ in listed] == ["FAILED", "unfinished", "unfinished"]
    assert [bool(reason) for _, reason in listed] == [True, True, False]
    assert "status.json cannot be read" in text


def test_what_a_plan_keeps() -> None:
    kept = heatmap(PLAN)
    assert kept.blocks == ["blocks.0", "blocks.1"]
    assert kept.kinds == {
        "attn branch": [Cell(1, 1), Cell(0, 1)],
        "mlp.hidden": [Cell(12, 48), Cell(48, 48)],
        "attn.proj rank": [Cell(6, 24), None],
    }
    assert heatmap(Plan(model=MODEL, edits=())).kinds == {}


def test_without_the_option_there_is_no_page(tmp_path: Path) -> None:
    save(tmp_path / "run")
    main([str(tmp_path), *NO_WANDB])
    assert not (tmp_path / "report" / "report.html").exists()


LOOK = """<script>
const cell = document.querySelector('.map td');
document.title = JSON.stringify({
  width: document.documentElement.scrollWidth,
  inner: innerWidth,
  images: [...document.images].map(image => image.complete && image.naturalWidth > 0),
  paper: getComputedStyle(document.body).backgroundColor,
  cells: document.querySelectorAll('.map td').length,
  colour: getComputedStyle(cell).backgroundColor,
});
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium (.ci/run installs it)")
@pytest.mark.parametrize(
    ("scheme", "width", "paper"),
    [(1, 1280, "rgb(255, 255, 255)"), (0, 500, "rgb(20, 23, 26)")],
    ids=["light-wide", "dark-narrow"],
)
def test_the_page_in_a_browser(tmp_path: Path, scheme: int, width: int, paper: str) -> None:
    page = publish(tmp_path)
    page.write_text(page.read_text().replace("</body>", LOOK))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen = json.loads(title[1])
    assert seen["width"] <= seen["inner"] <= width
    assert seen["images"] == [True, True]
    assert seen["paper"] == paper
    assert seen["cells"] == 6
    assert seen["colour"] not in (paper, "rgba(0, 0, 0, 0)")

from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64decode
from hashlib import sha256
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from nets import MODEL
from reports import NO_WANDB, PLAN, save
from vitrim import Plan
from vitrim.cli.report import main
from vitrim.plan import dumps
from vitrim.report.heatmap import Cell, heatmap

EVIL = "<script>document.title='owned'</script>\"&'"
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
    assert parsed.tags.count("script") == 2  # the points, and what draws them
    policy = re.search(r"script-src 'sha256-([^']+)'", page.read_text())
    script = re.search(r"<script>(.*?)</script>", page.read_text(), re.DOTALL)
    assert policy is not None
    assert script is not None
    assert b64decode(policy[1]) == sha256(script[1].encode()).digest()
    assert not re.search(r"innerHTML|insertAdjacent|eval|fetch|XMLHttp|import", script[1])
    data = [address for address in parsed.addresses if address.startswith("data:")]
    links = [address for address in parsed.addresses if not address.startswith("data:")]
    assert sum(address.startswith("data:image/png;base64,") for address in data) == 2
    assert len(links) == 3 + 2 * 4
    assert all((page.parent / unquote(link)).exists() for link in links)
    text = page.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"url\(|@import|https?:", text)


def test_what_others_wrote_is_escaped(tmp_path: Path) -> None:
    text = publish(tmp_path).read_text()
    assert "<script>document" not in text
    assert EVIL not in text
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
const table = document.querySelector('.of-model table');
const strengths = () => [...table.tBodies[0].rows].map(row => row.cells[1].textContent);
const heading = table.tHead.rows[0].cells[1];
const sorted = [strengths()];
for (const _ of [1, 2]) { heading.querySelector('button').click(); sorted.push(strengths()); }
const point = document.querySelector('#chart .point');
point.dispatchEvent(new Event('mouseenter'));
const tip = document.getElementById('tip');
const box = tip.getBoundingClientRect();
const hovered = tip.textContent;
const method = document.getElementById('of-method');
const shown = () => [...table.tBodies[0].rows].filter(row => row.offsetHeight > 0).length;
const filtered = [...method.options].map(option => {
  method.value = option.value;
  method.dispatchEvent(new Event('change'));
  return [shown(), document.querySelectorAll('#chart .point').length];
});
method.value = '';
method.dispatchEvent(new Event('change'));
const cut = [...document.querySelectorAll('h1, h2, p, summary, label, #legend li')].filter(
  part => part.scrollWidth > part.clientWidth + 1 && getComputedStyle(part).display !== 'inline');
parent.postMessage(JSON.stringify({
  width: document.documentElement.scrollWidth,
  inner: innerWidth,
  images: [...document.images].map(image => image.complete && image.naturalWidth > 0),
  paper: getComputedStyle(document.body).backgroundColor,
  cells: document.querySelectorAll('.map td').length,
  colour: getComputedStyle(cell).backgroundColor,
  sorted, hovered, filtered, cut: cut.map(part => part.textContent),
  sort: heading.getAttribute('aria-sort'),
  tip: [box.left, box.right],
}), '*');
</script></body>"""
FRAME = """<script>
addEventListener('message', event => document.title = event.data);
</script><iframe src="{}" style="width: {}px; height: 900px; border: 0"></iframe>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium (.ci/run installs it)")
@pytest.mark.parametrize(
    ("scheme", "width", "paper"),
    [(1, 1280, "rgb(255, 255, 255)"), (0, 400, "rgb(20, 23, 26)")],
    ids=["light-wide", "dark-narrow"],
)
def test_the_page_in_a_browser(tmp_path: Path, scheme: int, width: int, paper: str) -> None:
    """Sort, hover and filter, in a frame: no window is narrower than 500 pixels."""
    page = publish(tmp_path)
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    text, found = policy.subn("", page.read_text())  # it would refuse this test's script
    assert found == 1
    page.write_text(text.replace("</body>", LOOK))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page.relative_to(tmp_path), width))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen = json.loads(unescape(title[1]))
    assert seen["width"] <= seen["inner"] == width
    assert seen["images"] == [True, True]
    assert seen["paper"] == paper
    assert seen["cells"] == 6
    assert seen["colour"] not in (paper, "rgba(0, 0, 0, 0)")
    assert seen["sorted"] == [["4", "3"], ["3", "4"], ["4", "3"]]
    assert seen["sort"] == "descending"
    assert "top-1 90.00 %" in seen["hovered"]
    assert "MACs (M): 6" in seen["hovered"]
    assert 0 <= seen["tip"][0] < seen["tip"][1] <= width
    assert seen["filtered"] == [[2, 3], [1, 2], [1, 2]]  # the dense network stays
    assert seen["cut"] == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium (.ci/run installs it)")
def test_the_policy_lets_the_page_draw_and_no_other_script_run(tmp_path: Path) -> None:
    page = publish(tmp_path)
    page.write_text(page.read_text().replace("</body>", f"{EVIL}</body>"))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "<title>vitrim: 2 runs</title>" in done.stdout
    assert '<circle cx="' in done.stdout

"""A run of every kind of overlay that was stopped is resumed by the same command, to the same bits.

A kind is a data set, a method, and whether training images are few.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from torchvision.datasets import CIFAR10

from command import QUICK, Command
from contract import PACKAGE
from contract import subject as build
from identities import composed, identified_of, write_images
from stopping import comparable, stopped
from vitrim.cli.compose import CONF
from vitrim.cli.recipe import check_resumable
from vitrim.data import cifar
from vitrim.files import PHASES

ROOT = CONF / "experiment"
NAMES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))
FAST = ("digits-vtp", "imagefolder-practise-few")
pytestmark = pytest.mark.skipif(bool(PACKAGE), reason="overlays are of vitrim's own methods")


class Kind(NamedTuple):
    """What overlays have in common whose runs stop and resume alike."""

    data: str
    method: str
    is_few: bool

    def __str__(self) -> str:
        return f"{self.data}-{self.method}{'-few' * self.is_few}"


def kind_of(name: str) -> Kind:
    """Return the kind of an overlay, read from its yaml and those that it includes."""
    chosen = {"data": "digits", "method": "vtp", "samples": None}
    path = ROOT / f"{name.removeprefix('/experiment/')}.yaml"
    content = yaml.safe_load(path.read_text())
    for default in content["defaults"]:
        match default:
            case "_self_":
                pass
            case str():
                parent = kind_of(default)
                chosen |= {"data": parent.data, "method": parent.method}
                chosen["samples"] = 1 if parent.is_few else None
            case dict():
                ((group, choice),) = default.items()
                chosen[group.removeprefix("override /")] = choice
    samples = content.get("data", {}).get("samples", chosen["samples"])
    return Kind(str(chosen["data"]), str(chosen["method"]), samples is not None)


class FakeCifar(CIFAR10):
    """Forty images of noise, in place of files that have to be downloaded."""

    def __init__(self, root: str, *, train: bool, download: bool) -> None:
        generator = np.random.default_rng(int(train))
        self.data: Any = generator.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
        self.targets = [index % 10 for index in range(40)]
        self.transform = self.target_transform = None
        self.classes = list("abcdefghij")


@pytest.fixture(autouse=True)
def _cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "_SETS", {10: FakeCifar})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", train=8)


def words_of(name: str, root: Path) -> list[str]:
    """Return the command of an overlay with a tiny network on images of 8x8 pixels."""
    kind = kind_of(name)
    words = [
        f"experiment={name}", "trainer=cpu", "model=vit_digits",
        "model.pretrained=false", "model.reset_head=false", "model.image_size=8",
    ]  # fmt: skip
    classes = {"imagefolder": 2, "cifar10": 10}.get(kind.data)
    if classes is not None:
        words += ["model.args.in_chans=3", f"model.num_classes={classes}", "data.workers=0"]
        words += [f"data.root={root}", "data.batch_size=4"]
    if kind.data == "imagefolder":
        words.append("data.classes=null")
    if kind.is_few:
        words.append("data.samples=8")
    return words


def test_every_overlay_finds_the_run_that_it_began(root: Path, tmp_path: Path) -> None:
    assert len(NAMES) > 25
    assert {*FAST} <= {str(kind_of(name)) for name in NAMES}
    for name in NAMES:
        words = words_of(name, root)
        cfg = composed(*words)
        recipe = OmegaConf.to_yaml(cfg, resolve=True)
        run = identified_of(cfg)
        assert recipe == OmegaConf.to_yaml(cfg, resolve=True), name  # not changed
        assert run.identity.recipe == yaml.safe_load(recipe), name
        assert identified_of(cfg).folder == run.folder, name
        folder = tmp_path / name
        (folder / PHASES / "refit" / "checkpoints").mkdir(parents=True)
        (folder / "recipe.yaml").write_text(recipe)
        check_resumable(folder, dict(run.identity.recipe), run.contents)


def representatives() -> list[Any]:
    """Return one overlay of every kind; all but a few are slow."""
    names = {str(kind_of(name)): name for name in reversed(NAMES)}
    return [
        pytest.param(name, id=kind, marks=[] if kind in FAST else [pytest.mark.slow])
        for kind, name in sorted(names.items())
    ]


@pytest.mark.parametrize("name", representatives())
def test_a_stopped_run_of_every_kind_resumes_to_the_same_bits(
    command: Command, root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = kind_of(name)
    budget = "target.blocks=1" if kind.method in ("dcvit", "practise") else "target.macs=0.7"
    words = [*words_of(name, root), *build(kind.method).short, *QUICK, "strength=0"]
    words += ["target.blocks=null", "target.params=null", "latency.device=cpu", "latency.batch=1"]
    if kind.method == "transfer":
        first = command("method=fskd", "data=none", "target.macs=0.7", *small(words))
        words.append(f"from_run={first.report.parent}")
    else:
        words.append(budget)
    at_whole = [*words, f"out={command.out.with_name('whole')}"]
    whole, checks = stopped(command, at_whole, at=None, monkeypatch=monkeypatch)
    assert whole.code == 0, whole.message
    if kind.data == "none":  # there is nothing to stop
        command(*words).report.unlink()
    else:
        done, _ = stopped(command, words, at=2 * checks // 3, monkeypatch=monkeypatch)
        assert done.code == 143, done.message
    again = command(*words)
    assert again.code == 0, again.message
    assert comparable(again.report) == comparable(whole.report)
    assert again.report.parent.name == whole.report.parent.name


def small(words: list[str]) -> list[str]:
    """Return the words that choose the network and keep a run short."""
    return [word for word in words if word.startswith(("model.", "model=", "latency.", "progress"))]

"""Packages of others: what the command line may name, what files may not, and what a run does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import vitrim
from command import EVERY_IMAGE, QUICK, Command
from fresh import Popen
from vitrim.cli import guard, plugins

DRY = ("data=none", "strength=2", "latency.repeats=1", "tracking=none")
SHORT = (*QUICK, "method=mine")
METHOD = '''
from dataclasses import dataclass
from typing import ClassVar

from vitrim.budget.trim import trim
from vitrim.method.fskd import FSKD  # noqa: F401  (imported here, defined elsewhere)
from vitrim.plan import Proposal


@dataclass(frozen=True, kw_only=True, slots=True)
class DropLast:
    """Remove the last blocks."""

    levels: tuple
    metric: ClassVar[str] = "macs"
    granularity: ClassVar[str] = "block"

    def check(self, cost, target):
        pass

    def scorer(self, net):
        return Nothing(net)

    def plan(self, net, evidence, cost, target):
        from vitrim.budget.blocks import fewest
        from vitrim.network.structure import blocks_of
        from vitrim.plan import Drop

        blocks = blocks_of(cost.structure)
        dropped = fewest(cost, target, [*blocks][::-1], hint="")
        return Proposal(edits=tuple(Drop(branch=name) for b in dropped for name in blocks[b]))


class NotData:
    """A class that is no dataclass."""


def Nothing(net):
    from lightning import LightningModule
    from vitrim.plan import Evidence

    class Nothing(LightningModule):
        epochs, resumes_at, clip_norm, trains = 0, "never", 0.0, False
        calibration_images, settings = 1, {}

        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, index):
            return None

        def configure_optimizers(self):
            return None

        def evidence(self):
            return Evidence()

    return Nothing()
'''
DATA = '''
from dataclasses import dataclass

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Blobs(LightningDataModule):
    """Two classes of grey images, bright and dark."""

    num_classes = 2

    def __init__(self, *, batch_size, side, sampler=False):
        super().__init__()
        self.batch_size, self.side, self.sampler = batch_size, side, sampler
        self.seen = []

    def setup(self, stage):
        labels = torch.arange(32) % 2
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(32, 1, self.side, self.side, generator=generator)
        self.images = TensorDataset(noise / 4 + 2.0 * labels[:, None, None, None] - 1, labels)

    def train_dataloader(self):
        if self.sampler:
            from torch.utils.data import WeightedRandomSampler

            sampler = WeightedRandomSampler([1.0], 32)
            return DataLoader(self.images, self.batch_size, sampler=sampler)
        return DataLoader(self.images, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.images, self.batch_size)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            images, labels = batch
            return images.flip(-1), labels
        return batch


@dataclass(frozen=True, kw_only=True)
class Squares:
    """Red and blue squares, as Hugging Face's datasets keep them."""

    batch_size: int

    def splits(self):
        import datasets
        from PIL import Image

        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=["red", "blue"])
        )
        def rows(number):
            for index in range(number):
                color = (250 - index, 9, 9) if index % 2 == 0 else (9, 9, 250 - index)
                yield {"image": Image.new("RGB", (12, 12), color), "label": index % 2}
        whole = [*rows(12)]
        columns = {key: [row[key] for row in whole] for key in ("image", "label")}
        images = datasets.Dataset.from_dict(columns, features=features)
        split = images.train_test_split(4, seed=0, stratify_by_column="label")
        return split["train"], split["test"]


class Nothing(LightningDataModule):
    def train_dataloader(self):
        return iter(())

    val_dataloader = train_dataloader
'''
NET = """
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer


@register_model
def PACKAGE_vit(pretrained=False, **kwargs):
    kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    kwargs.pop("cache_dir", None)
    net = VisionTransformer(**{"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2,
                               "img_size": 8, "in_chans": 3, **kwargs})
    net.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return net
"""
YAMLS = {
    "method/mine": {
        "_target_": "PACKAGE.method.DropLast",
        "levels": [1.0, 0.8, 0.6, 0.5, 0.4, 0.3],
    },
    "data/blobs": {"_target_": "PACKAGE.data.Blobs", "batch_size": 8, "side": 8},
    "data/squares": {"_target_": "PACKAGE.data.Squares", "batch_size": 4},
    "data/nothing": {"_target_": "PACKAGE.data.Nothing"},
}


class Package:
    """A package outside of vitrim in a folder of its own, with configurations in mine/."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"from {name} import net\n")
        for module, text in (("method", METHOD), ("data", DATA), ("net", NET)):
            (folder / name / f"{module}.py").write_text(text.replace("PACKAGE", name))
        for path, content in YAMLS.items():
            self.configure(path, content)

    def configure(self, path: str, content: dict[str, object]) -> None:
        file = self.folder / "mine" / f"{path}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(content).replace("PACKAGE", self.name))

    @property
    def words(self) -> tuple[str, ...]:
        return "--config-dir", str(self.folder / "mine"), f"plugins=[{self.name}]"


@pytest.fixture
def package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Package]:
    """Return a package that only this test imports, in the folder in which the command is typed."""
    name = f"own_{abs(hash(request.node.name)):x}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield Package(tmp_path, name)
    guard.trust_named(())
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


def test_a_method_of_ones_own(command: Command, package: Package) -> None:
    done = command(*package.words, "method=mine", *DRY)
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    assert report["compact"]["macs"] < report["dense"]["macs"]
    assert report["plugins"] == {"method": [package.name]}
    assert vitrim.load(done.report.parent)[1].method == "mine"
    refused = command(*package.words[:2], "method=mine", *DRY)  # it is no longer named
    assert refused.code == 1
    assert f"method._target_={package.name}.method.DropLast" in refused.message
    assert "plugins=[PACKAGE] on the command line" in refused.message


def test_jobs_of_a_sweep_get_the_plugins(
    command: Command, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrim.jobs.sweep.subprocess", SimpleNamespace(Popen=Popen))
    done = command("-m", *package.words, "method=mine", *DRY)
    assert done.code == 0, done.message
    assert len(list(command.out.rglob("report.json"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "joblib"])
def test_jobs_of_launchers_get_the_plugins(launcher: str, package: Package) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    done = typed("-m", *package.words, f"hydra/launcher={launcher}", "method=mine", *DRY)
    assert done.returncode == 0, done.stderr
    (report,) = (package.folder / "outputs").rglob("report.json")
    assert str(report.relative_to(package.folder)) in done.stdout


@pytest.mark.slow
def test_two_processes_of_a_run_get_the_plugins(package: Package) -> None:
    words = (*package.words, *QUICK, "data=blobs", "model.num_classes=2", "method=oneshot")
    two = ("trainer.devices=2", "trainer.strategy=ddp", "method.sampling.images=16")
    done = typed(*words, *two)
    assert done.returncode == 0, done.stderr
    (report,) = (package.folder / "outputs").rglob("report.json")
    assert json.loads(report.read_text())["plugins"] == {"data": [package.name]}


def typed(*words: str) -> subprocess.CompletedProcess[str]:
    """Return what the command does in a process of its own, in the current folder."""
    return subprocess.run(
        [sys.executable, "-m", "vitrim", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_data_module_of_ones_own(command: Command, package: Package) -> None:
    quick = (*package.words, *QUICK, EVERY_IMAGE)
    words = (*quick, "method=oneshot", "data=blobs", "model.num_classes=2")
    done = command(*words, "method.sampling.images=16", "model.training.epochs=8")
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    assert (report["evaluated_images"], report["dataset"]["classes"]) == (32, 2)
    assert report["dense"]["top1"] > 90
    assert report["plugins"] == {"data": [package.name]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("data.side=9",), "images (1, 9, 9), the network expects tensors (1, 8, 8)"),
        (("+data.sampler=true",), "WeightedRandomSampler: a run draws batches itself"),
        (("+data.nothing=true",), "unknown key data.nothing: expected one of batch_size, side"),
        (("data=nothing",), "expected one DataLoader"),
    ],
)
def test_a_data_module_that_does_not_fit(
    command: Command, package: Package, words: tuple[str, ...], expected: str
) -> None:
    chosen = (*package.words, "data=blobs", "model.num_classes=2", *words)
    done = command(*chosen, "strength=0", "tracking=none")
    assert done.code == 1
    assert expected in done.message
    assert not list(command.out.rglob("recipe.yaml"))


def test_a_data_set_of_hugging_face(command: Command, package: Package) -> None:
    pytest.importorskip("datasets")
    words = (*package.words, *QUICK, EVERY_IMAGE, "method=oneshot", "data=squares")
    net = ("model=timm", f"model.name={package.name}_vit", "model.num_classes=2")
    done = command(*words, *net, "method.sampling.images=8", "model.training.epochs=1")
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    assert report["classes"] == ["red", "blue"]
    assert report["evaluated_images"] == 4
    assert report["plugins"] == {"data": [package.name], "model": [package.name]}
    net_again, plan = vitrim.load(done.report.parent)
    assert plan.model["name"] == f"{package.name}_vit"
    assert net_again.num_classes == 2


def test_plugins_that_change_nothing_leave_the_name_of_a_run(
    command: Command, package: Package
) -> None:
    plain = command("method=oneshot", *DRY).report
    named = command(*package.words, "method=oneshot", *DRY)
    assert named.code == 0, named.message
    assert named.report == plain
    assert "plugins" not in json.loads(plain.read_text())


def test_an_entry_point_names_a_package(
    command: Command, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = package.folder / "site" / "some_dist-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\nshort = {package.name}\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(info.parent)])
    done = command(*package.words[:2], "plugins=[short]", "method=mine", *DRY)
    assert done.code == 0, done.message
    missing = command("plugins=[shot]", *DRY)
    assert "no package shot, and installed packages offer short" in missing.message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("plugins=[no_such_package]",), "there is no package no_such_package: install it"),
        (("plugins=[a/b]",), "plugins=[a/b]: expected names of packages, as in plugins=[mypkg]"),
        (("plugins=[3]",), "plugins=[3]: expected names of packages"),
        (("plugins=null",), "plugins=null: expected names of packages"),
        (("plugins=['${out}']",), "expected names of packages"),
        (("method._target_=OWN.method.Missing",), "OWN.method has no Missing"),
        (("method._target_=OWN.missing.Method",), "OWN.missing cannot be imported"),
        (("method._target_=OWN.method.NotData",), "expected a dataclass or a LightningDataModule"),
        (("method._target_=OWN.method.FSKD",), "expected vitrim.method.fskd.FSKD, where it is"),
        (("method._target_=OWN.method.trim",), "OWN.method"),
        (("trainer._target_=OWN.method.DropLast",), "expected lightning.Trainer"),
        (
            ("data._target_=OWN.method.DropLast", "+data.levels=[1.0]"),
            "data: DropLast is no data set: expected the members of vitrim.data.Data",
        ),
        (("data.no_such_key=1",), "unknown key data.no_such_key"),
    ],
)
def test_a_wrong_plugin_ends_in_one_sentence_before_any_work(
    command: Command, package: Package, words: tuple[str, ...], expected: str
) -> None:
    chosen = [word.replace("OWN", package.name) for word in words]
    before = package.words[:2] if any(w.startswith("plugins") for w in words) else package.words
    done = command(*before, "method=mine", *DRY, *chosen)
    assert done.code == 1
    assert expected.replace("OWN", package.name) in done.message
    assert "Traceback" not in done.message
    assert not list(command.out.rglob("recipe.yaml"))


def test_a_plugin_that_cannot_be_imported_is_named(command: Command, package: Package) -> None:
    (package.folder / package.name / "broken.py").write_text("import no_such_dependency\n")
    done = command(f"plugins=[{package.name}.broken]", *DRY)
    assert f"{package.name}.broken cannot be imported (ModuleNotFoundError" in done.message
    (package.folder / package.name / "worse.py").write_text("def:")
    done = command(f"plugins=[{package.name}.worse]", *DRY)
    assert "cannot be imported (SyntaxError" in done.message


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("experiment/evil", {"plugins": ["CANARY"]}, ("+experiment@_global_=evil",)),
        ("experiment/evil", {"plugins": "CANARY"}, ("+experiment@_global_=evil",)),
        ("experiment/evil", {"a": "CANARY"}, ("+experiment@plugins=evil",)),
        ("plugins/evil", {"a": "CANARY"}, ("+plugins=evil",)),
        ("evil", {"defaults": ["run", "_self_"], "plugins": ["CANARY"]}, ("--config-name", "evil")),
        ("experiment/evil", {"x": ["CANARY"]}, ("+experiment@_global_=evil", "plugins=${x}")),
        ("experiment/evil", {"x": "CANARY"}, ("+experiment@_global_=evil", "plugins=['${x}']")),
    ],
)
def test_no_file_can_name_a_plugin(
    command: Command, package: Package, path: str, content: object, words: tuple[str, ...]
) -> None:
    canary = package.folder / package.name / "canary.py"
    canary.write_text(f"open({str(package.folder / 'touched')!r}, 'w')\n")
    file = package.folder / "mine" / f"{path}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(content).replace("CANARY", f"{package.name}.canary")
    file.write_text(text)
    done = command(*package.words[:2], *DRY, *words)
    assert done.code == 1
    assert "plugins" in done.message
    assert not (package.folder / "touched").exists()
    assert not list(command.out.rglob("recipe.yaml"))

"""Every method's yaml, found by itself: from the command line to a report and a loadable net."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import vitrim
from command import Command
from vitrim.run import CONF

METHODS = sorted(path.stem for path in (CONF / "method").rglob("*.yaml"))


def short(method: str) -> list[str]:
    """Return overrides that make every phase of `method` one epoch long."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"method={method}"])
    phases = [key for key, value in cfg.method.items() if OmegaConf.is_dict(value)]
    return [f"method.{key}.epochs=1" for key in phases if "epochs" in cfg.method[key]]


def test_the_methods_are_found() -> None:
    assert METHODS == ["aiminify", "oneshot", "vtp"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_yaml_to_report(command: Command, method: str) -> None:
    done = command(
        f"method={method}",
        "strength=2.5",
        "model.training.epochs=1",
        "trainer.limit_train_batches=2",
        "trainer.log_every_n_steps=1",
        "latency.repeats=1",
        "tracking=none",
        "progress=false",
        *short(method),
    )
    assert done.code == 0
    report = json.loads(done.report.read_text())
    assert report["compact"]["params"] < report["dense"]["params"]
    assert report["compact"]["macs"] < report["dense"]["macs"]
    net, plan = vitrim.load(done.report.parent)
    assert plan.provenance["method"] == method
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_grows_with_strength(command: Command, method: str) -> None:
    def params(strength: float) -> int:
        done = command(f"method={method}", f"strength={strength}", "data=none", "latency.repeats=1")
        return int(json.loads(done.report.read_text())["compact"]["params"])

    sizes = [params(strength) for strength in (0, 1, 2, 3, 4, 5)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_every_experiment_composes() -> None:
    found = sorted((CONF / "experiment").rglob("*.yaml"))
    assert found
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for path in found:
            name = Path(path).relative_to(CONF / "experiment").with_suffix("")
            assert compose("run", overrides=[f"experiment={name}"]).method

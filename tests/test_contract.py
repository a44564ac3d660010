"""Every method's yaml, found by itself: from the command line to a report and a loadable net."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import vitrim
from command import Command, Done
from vitrim.run import CONF

METHODS = sorted(path.stem for path in (CONF / "method").rglob("*.yaml"))


def short(method: str) -> list[str]:
    """Return overrides that make every phase of `method` one epoch long."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"method={method}"])
    return [f"{key}.epochs=1" for key in recipes(cfg.method, "method")]


def recipes(node: DictConfig, where: str) -> Iterator[str]:
    """Iterate over the keys of the training recipes below `node`."""
    for name, value in node.items():
        if OmegaConf.is_dict(value):
            if "epochs" in value:
                yield f"{where}.{name}"
            yield from recipes(value, f"{where}.{name}")


def test_the_methods_are_found() -> None:
    assert METHODS == ["aiminify", "cd", "fskd", "mixed_rank", "oneshot", "vtp"]


def run(command: Command, method: str, strength: float) -> Done:
    done = command(
        f"method={method}",
        f"strength={strength}",
        "model.training.epochs=1",
        "trainer.limit_train_batches=2",
        "trainer.log_every_n_steps=1",
        "latency.repeats=1",
        "tracking=none",
        "progress=false",
        *short(method),
    )
    assert done.code == 0
    return done


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_yaml_to_report(command: Command, method: str) -> None:
    done = run(command, method, 2.5)
    report = json.loads(done.report.read_text())
    assert report["compact"]["params"] < report["dense"]["params"]
    assert report["compact"]["macs"] < report["dense"]["macs"]
    net, plan = vitrim.load(done.report.parent)
    assert plan.provenance["method"] == method
    assert net(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("method", METHODS)
def test_strengths_share_one_scoring(command: Command, method: str) -> None:
    for strength in (2, 4):
        run(command, method, strength)
    (scored,) = (command.out / "phases").glob("score-*")
    assert (scored / "manifest.json").is_file()


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

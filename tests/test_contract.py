"""Every method's yaml, found by itself: from the command line to a report and a loadable net."""

import json
from collections.abc import Iterator

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import vitrim
from command import QUICK, Command, Done, swin
from vitrim.cli.compose import CONF

METHODS = sorted(path.stem for path in (CONF / "method").rglob("*.yaml"))


COARSE = ("mir", "practise")
"""Those that drop whole blocks: of a network of four, not every strength leaves another size."""


def short(method: str) -> list[str]:
    """Return overrides that make every phase of `method` one epoch or one iteration long."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"method={method}"])
    return [f"{key}=1" for key in lengths(cfg.method, "method")]


def lengths(node: DictConfig, where: str) -> Iterator[str]:
    """Iterate over the keys below `node` that say how long something takes."""
    for name, value in node.items():
        if OmegaConf.is_dict(value):
            yield from lengths(value, f"{where}.{name}")
        elif name in ("epochs", "iterations"):
            yield f"{where}.{name}"


def test_the_methods_are_found() -> None:
    assert METHODS == [
        "aiminify",
        "cd",
        "dcvit",
        "fskd",
        "mir",
        "mixed_rank",
        "oneshot",
        "practise",
        "vtp",
    ]


def run(command: Command, method: str, strength: float, *more: str) -> Done:
    done = command(f"method={method}", f"strength={strength}", *QUICK, *short(method), *more)
    assert done.code == 0
    return done


@pytest.mark.parametrize("model", [("model=vit_digits",), swin("[2,2]")], ids=["vit", "swin"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_yaml_to_report(
    command: Command, method: str, model: tuple[str, ...]
) -> None:
    done = run(command, method, 2.5, *model)
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
    assert len(set(sizes)) == len(sizes) or method in COARSE

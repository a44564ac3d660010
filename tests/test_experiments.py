"""Overlays of conf/experiment: their headers are complete, and all documented commands compose."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache

import pytest
import timm
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vitrim.cli.compose import CONF
from vitrim.method import check_method
from vitrim.paper import published
from vitrim.paper.results import results

SOURCES = ("aiminify", "dcvit", "mixed_rank", "oneshot", "vtp")
ROOT = CONF / "experiment"
NAMES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.yaml"))
PUBLISHED = [name for name in NAMES if name.partition("/")[0] in SOURCES]


def header(name: str) -> str:
    """Return the comment that an overlay opens with, without its marks."""
    lines = (ROOT / f"{name}.yaml").read_text().splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def commands(name: str) -> list[list[str]]:
    """Return the overrides of every `vitrim` command in a header; of a sweep, its first job's."""
    text = header(name).replace("\\\n", "")
    return [words(line) for line in re.findall(r"^  vitrim (.*)$", text, re.MULTILINE)]


def words(line: str) -> list[str]:
    """Return the overrides of a command; of a sweep, those of its first job."""
    return [*_first(shlex.split(line, comments=True))]


def _first(arguments: list[str]) -> Iterator[str]:
    overrides = [word for word in arguments if word != "-m"]
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override():
            yield f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
        else:
            yield str(override.input_line)


@cache
def composed(*overrides: str) -> DictConfig:
    """Compose a run, and build its network's source and method: that checks their keys."""
    cfg = compose("run", overrides=[*overrides])
    instantiate(cfg.model, _convert_="all")
    check_method(instantiate(cfg.method, _convert_="all"))
    return cfg


def test_the_sources_have_overlays() -> None:
    assert {name.partition("/")[0] for name in PUBLISHED} == set(SOURCES)
    tables = {f"dcvit/table{number}" for number in (3, 4, 5, 6, 7, 8)}
    assert tables <= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_header_says_rows_command_time_and_expected_number(name: str) -> None:
    text = header(name)
    for word in ("Rows: ", "Time: ", "Expected: "):
        assert text.count(f"\n{word}") == 1
    documented = commands(name)
    assert documented
    assert all(f"experiment={name}" in overrides for overrides in documented)
    expected = text.partition("\nExpected: ")[2]
    flags = ("verified", "quoted", "primary", "not recovered", "ours")
    assert any(flag in expected for flag in flags)


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_and_its_commands_compose(name: str) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for overrides in commands(name):
            cfg = composed(*overrides)
            assert cfg.model.name == "dinov2_vits14_lc" or timm.is_model(cfg.model.name)
            if "data=none" in overrides:
                assert instantiate(cfg.data) is None


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_selects_and_builds_nothing(name: str) -> None:
    assert "_target_" not in (ROOT / f"{name}.yaml").read_text()


def test_commands_of_results_compose() -> None:
    lines = [result.command.partition("vitrim ")[2] for result in results()]
    assert any(lines)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for line in filter(None, lines):
            composed(*words(line))


def documented() -> dict[str, list[str]]:
    """Return the lines of all blocks of commands in README and docs, by document.

    Those of experiments.md and results.md are commands of headers and results.
    """
    root = CONF.parent
    pages = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    lines = {}
    for path in [page for page in pages if page.stem not in ("experiments", "results")]:
        text = path.read_text().replace("\\\n", "")
        blocks = re.findall(r"^```(?:bash|console|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        name = path.relative_to(root).as_posix()
        lines[name] = [line.strip() for block in blocks for line in block.splitlines()]
    return lines


def test_commands_of_the_documents_compose() -> None:
    found = {line for lines in documented().values() for line in lines if "vitrim " in line}
    runs = {
        line.partition("vitrim ")[2] for line in found if re.match(r"([A-Z_]+=\S+ )*vitrim ", line)
    }
    assert len(runs) >= 30
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for line in sorted(line for line in runs if "--" not in line):
            composed(*words(line))


DEIT = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
DEIT_MIXING = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}
FEW = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "re_prob": 0.0}
FEW_MIXING = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0}
OF_VTP = {"epochs": 100, "lr": 6.25e-6, "weight_decay": 0.05, "warmup_epochs": 5, "repeats": 3}
OF_DCVIT = {"epochs": 2000, "lr": 3e-5, "weight_decay": 1e-4, "warmup_epochs": 20, "clip_norm": 1.0}
OF_DEIT = {
    **{"epochs": 300, "lr": 1e-3, "weight_decay": 0.05, "warmup_epochs": 5, "repeats": 3},
    **{"min_lr": 1e-5, "warmup_lr": 1e-6, "reference_batch": 1024, "ema_decay": 0.0},
}
TRAININGS = {
    "vtp/imagenet": ("method.gating", "method.fine_tuning"),
    "vtp/imagenet100": ("method.gating", "method.fine_tuning"),
    "dcvit/table3": ("method.trial.training", "method.tuning.training"),
    "dcvit/table3_practise": ("method.tuning",),
    "dcvit/table4_dcvit": ("method.trial.training", "method.tuning.training"),
    "dcvit/table5": ("method.trial.training", "method.tuning.training"),
    "dcvit/table5_swin": ("method.trial.training", "method.tuning.training"),
    "dcvit/table5_practise": ("method.tuning",),
    "dcvit/table6": ("method.trial.training", "method.tuning.training"),
    "deit": ("model.training",),
}


@pytest.mark.parametrize("name", sorted(TRAININGS))
def test_a_published_recipe_has_the_numbers_of_its_paper(name: str) -> None:
    few = name.startswith("dcvit")
    numbers = OF_DCVIT if few else OF_DEIT if name == "deit" else OF_VTP
    if name == "dcvit/table5_practise":  # the epochs of DC-ViT's whole schedule
        numbers = {**numbers, "epochs": 6000}
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"experiment={name}"])
    for key in TRAININGS[name]:
        training = OmegaConf.select(cfg, key)
        assert {name: training.get(name) for name in numbers} == numbers, key
        assert (training.get("optimizer", "adamw"), training.get("ema_decay", 0.0)) == ("adamw", 0)
        if not few:
            assert training.reference_batch == 1024
    assert {key: cfg.data.augmentation[key] for key in (FEW if few else DEIT)} == (
        FEW if few else DEIT
    )
    mixing = FEW_MIXING if few else DEIT_MIXING
    assert {key: cfg.data.mixing[key] for key in mixing} == mixing
    if few:
        assert cfg.data.batch_size == 64
    assert cfg.model.args.get("drop_path_rate", 0.0) == (0.0 if few else 0.1)


OTHER_RECIPES = {
    "mir in table 4": (2, "method=mir", {"method.tuning": OF_DCVIT, "method.pooled_weight": 0}),
    "practise in table 4": (
        *(2, "method=practise"),
        {
            "method.tuning": OF_DCVIT,
            "method.pooled_weight": 0,
            "method.adaptor_training": {"iterations": 2000, "lr": 0.02, "momentum": 0.9},
        },
    ),
    "fskd in table 4": (0, "method=fskd", {"method.images": 500}),
    "cd in table 4": (
        *(1, "method=cd"),
        {
            "method.images": 500,
            "method.mu": 0.9,
            "method.fine_tuning": {"epochs": 40, "lr": 1e-5, "weight_decay": 0.0},
        },
    ),
}
"""The number of the command in the header of dcvit/table4, its method, and the paper's values."""


@pytest.mark.parametrize("name", OTHER_RECIPES)
def test_methods_for_convolutional_networks_have_the_numbers_of_their_papers(name: str) -> None:
    number, method, expected = OTHER_RECIPES[name]
    given = [word for word in commands("dcvit/table4")[number] if not word.startswith("method=")]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[*given, method])
    for key, numbers in expected.items():
        found = OmegaConf.select(cfg, key)
        if isinstance(numbers, dict):
            found = {name: found.get(name) for name in numbers}
        assert found == numbers, key
    assert (cfg.data.batch_size, cfg.data.samples) == (64, 500)
    assert {key: cfg.data.mixing[key] for key in FEW_MIXING} == FEW_MIXING


def test_the_longer_schedule_of_table_6_is_that_of_all_steps() -> None:
    (longer,) = (words for words in commands("dcvit/table6") if "epochs" in " ".join(words))
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=longer)
    training = cfg.method.tuning.training
    assert {name: training.get(name) for name in OF_DCVIT} == {
        **OF_DCVIT,
        "epochs": 4 * 2000,
    }  # of 4 blocks
    assert not cfg.method.progressive


def test_transfer_has_the_optimizer_and_the_batch_of_the_paper() -> None:
    for given in commands("dcvit/table7"):
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = compose("run", overrides=given)
        assert cfg.data.batch_size == 256
        assert cfg.model.training.get("optimizer", "adamw") == "adamw"


def test_published_rows_use_the_keys_of_their_overlays() -> None:
    assert {row.experiment for row in published()} - {""} <= set(PUBLISHED)
    for row in published():
        known = {"model", *(w.partition("=")[0] for ws in _known(row.experiment) for w in ws)}
        for word in row.overrides.split():
            key, _, value = word.partition("=")
            assert key in known or f"  {key.rpartition('.')[2]}:" in _text(row.experiment)
            if key in ("model", "method", "data"):
                assert (CONF / key / f"{value}.yaml").is_file()


@cache
def _known(name: str) -> list[list[str]]:
    return commands(name) if name else []


def _text(name: str) -> str:
    return (ROOT / f"{name}.yaml").read_text()

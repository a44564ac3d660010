from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from vitrim.cli import config_files, guard, loaded


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    guard.install()
    monkeypatch.setattr(loaded, "_kept", {})


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that Hydra parses, as it goes on."""
    names: list[str] = []
    load = OmegaConf.load

    def recorded(file: TextIO) -> object:
        names.append(Path(file.name).name)
        return load(file)

    monkeypatch.setattr(OmegaConf, "load", recorded)
    return names


def compose(folder: Path, *words: str, config: str = "eval") -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        return hydra.compose(config, [*words])


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return what writes a file of vitrim's own in a folder for this test."""
    monkeypatch.setattr(config_files, "CONF", tmp_path)

    def write(text: str) -> Path:
        (tmp_path / "eval.yaml").write_text(text)
        return tmp_path

    return write


def test_own_files_are_parsed_once_and_give_the_same_again(read: list[str]) -> None:
    words = ("model=vit_digits", "method=vtp", "data=digits")
    first = compose(config_files.CONF, *words, config="run")
    assert {"run.yaml", "vit_digits.yaml", "vtp.yaml", "digits.yaml"} <= set(read)
    read.clear()
    assert compose(config_files.CONF, *words, config="run") == first
    assert compose(config_files.CONF, "method=vtp", "strength=2", config="run").strength == 2
    assert compose(config_files.CONF, *words, config="run") == first
    assert read == []


def test_what_is_changed_in_one_composition_is_not_in_the_next(
    own: Callable[[str], Path],
) -> None:
    folder = own("a: {b: [1, 2]}")
    compose(folder).a.b[0] = 5
    assert compose(folder) == {"a": {"b": [1, 2]}}


def test_a_changed_file_is_parsed_again(own: Callable[[str], Path]) -> None:
    folder = own("a: 1")
    assert compose(folder) == {"a": 1}
    assert compose(own("a: 10")) == {"a": 10}
    os.utime(own("a: 20") / "eval.yaml", ns=(1, 1))
    assert compose(folder) == {"a": 20}


def test_files_of_others_are_parsed_and_checked_each_time(tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "eval.yaml").write_text("a: 1")
    assert compose(tmp_path) == compose(tmp_path) == {"a": 1}
    assert read.count("eval.yaml") == 2


def test_what_cannot_be_loaded_is_not_kept(own: Callable[[str], Path]) -> None:
    with pytest.raises(Exception, match="not a plain configuration"):
        compose(own("a: [1"))
    assert compose(own("a: [1]")) == {"a": [1]}

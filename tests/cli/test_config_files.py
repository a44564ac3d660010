"""Configuration files of an attacker, by every way that a file comes in: none of them acts."""

from __future__ import annotations

import os
import pickle
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command import Command
from vitrim.cli.compose import CONF

SECRET = "hunter2"
LOGGING = "hydra:\n  job_logging:\n    "
FILE = "{class: logging.FileHandler, filename: CANARY}"
Made = Callable[[Path], list[str]]


def files(content: dict[str, str], *words: str) -> Made:
    """Return what writes files into a config folder and returns the words that choose them."""

    def made(folder: Path) -> list[str]:
        for name, text in content.items():
            path = folder / "conf" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("CANARY", str(folder / "canary")))
        return [word.replace("FOLDER", str(folder)) for word in words]

    return made


def experiment(text: str, *words: str) -> Made:
    """Return what chooses a file with this text as an experiment."""
    named = {"experiment/evil.yaml": "# @package _global_\n" + textwrap.dedent(text)}
    return files(named, "--config-dir", "FOLDER/conf", *(words or ("experiment=evil",)))


def word(*words: str) -> Made:
    return lambda folder: [text.replace("CANARY", str(folder / "canary")) for text in words]


def linked(text: str) -> Made:
    """Return what chooses an experiment in a folder that is a link."""

    def made(folder: Path) -> list[str]:
        experiment(text)(folder)
        (folder / "conf" / "experiment").rename(folder / "elsewhere")
        (folder / "conf" / "experiment").symlink_to(folder / "elsewhere")
        return [f"hydra.searchpath=[file://{folder}/conf]", "experiment=evil"]

    return made


def special(kind: str) -> Made:
    """Return what chooses an experiment that is no file."""

    def made(folder: Path) -> list[str]:
        path = folder / "conf" / "experiment" / "evil.yaml"
        path.parent.mkdir(parents=True)
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "device":
                path.symlink_to("/dev/zero")
            case "loop":
                path.symlink_to(path)
            case "bytes":
                path.write_bytes(b"seed: \xff\xfe\n")
            case "large":
                path.write_text("#" * 70_000)
        return ["--config-dir", str(folder / "conf"), "experiment=evil"]

    return made


class Payload:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.folder / "canary",)


def rerun(flag: str) -> Made:
    def made(folder: Path) -> list[str]:
        (folder / "config.pickle").write_bytes(pickle.dumps(Payload(folder)))
        return [f"{flag}={folder}/config.pickle"]

    return made


def module(*words: str) -> Made:
    """Return what writes a package beside conf/ that leaves a trace when it is imported."""

    def made(folder: Path) -> list[str]:
        (folder / "evil").mkdir()
        trace = f"import pathlib\npathlib.Path({str(folder / 'canary')!r}).touch()\n"
        (folder / "evil" / "__init__.py").write_text(trace)
        return list(words)

    return made


STRINGS = "\n".join(f"a{n}: ${{a{n - 1}}}${{a{n - 1}}}" if n else "a0: xx" for n in range(40))
NODES = "a0: 1\n" + "\n".join(
    f"a{n}: {{x: '${{a{n - 1}}}', y: '${{a{n - 1}}}'}}" for n in range(1, 40)
)
CHAIN = "\n".join(f"a{n}: ${{a{n + 1}}}" for n in range(400))
LONG = f"a: &a {'x' * 50_000}\nb: [{', '.join(['*a'] * 1000)}]"
MERGES = "a0: &a0 {b0: 1}\n" + "\n".join(
    f"a{n}: &a{n} {{<<: *a{n - 1}, b{n}: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 30)
)
PARAMS = "hydra:\n  sweeper:\n    params:\n      hydra.job_logging.root.level: DEBUG\n"

CASES: dict[str, tuple[Made, str]] = {
    # logging imports and calls what it resolves
    "ext in a handler": (
        experiment(LOGGING + "handlers:\n      console: {stream: 'ext://antigravity.x'}"),
        "hydra.job_logging.handlers.console.stream=ext://antigravity.x",
    ),
    "cfg in a formatter": (
        experiment(LOGGING + "formatters:\n      simple: {format: 'cfg://handlers'}"),
        "cfg://handlers",
    ),
    "ext in the log of Hydra": (
        experiment(
            "hydra:\n  hydra_logging:\n    handlers:\n      x: {stream: 'ext://os.environ'}"
        ),
        "ext://os.environ",
    ),
    "an attribute of a handler": (
        experiment(LOGGING + "handlers:\n      console: {'.': {baseFilename: CANARY}}"),
        "attributes",
    ),
    "ext on the command line": (
        word("hydra.job_logging.handlers.console.stream=ext://os.environ"),
        "ext://os.environ",
    ),
    "a formatter of a class": (
        experiment(LOGGING + "formatters:\n      simple: {class: antigravity.x}"),
        "antigravity.x",
    ),
    "a width of a formatter": (
        experiment(LOGGING + "formatters:\n      simple: {format: '%(message)999999999s'}"),
        "formatters.simple.format",
    ),
    "a level of a logger": (experiment(LOGGING + "root: {level: NOTSET}"), "root.level=NOTSET"),
    # files elsewhere
    "a log file": (experiment(LOGGING + f"handlers:\n      file: {FILE}"), "filename"),
    "a log file by the job's name": (
        experiment("hydra: {job: {name: ../../CANARY}}"),
        "hydra.job.name",
    ),
    "a log file by the command line": (
        word("hydra/job_logging=default", "hydra.job.name=../../x"),
        "hydra.job.name",
    ),
    "a log file by its folder": (
        experiment("hydra: {runtime: {output_dir: CANARY}}"),
        "hydra.runtime.output_dir",
    ),
    "a log file of a whole logging": (
        experiment("defaults:\n  - override /hydra/job_logging: default"),
        "override /hydra/job_logging",
    ),
    "Hydra's folder": (experiment("hydra: {run: {dir: CANARY}}"), "hydra.run.dir"),
    "Hydra's subfolder": (experiment("hydra: {output_subdir: ../../x}"), "hydra.output_subdir"),
    "Hydra's folder of a sweep": (
        experiment("hydra: {sweep: {dir: CANARY}}", "-m", "experiment=evil,demo"),
        "hydra.sweep.dir",
    ),
    "a main file that is an experiment": (
        experiment("seed: 1", "--config-name=experiment/evil"),
        "unknown key data",
    ),
    "a launcher's class": (
        experiment("hydra: {launcher: {_target_: os.system}}"),
        "hydra.launcher._target_=os.system",
    ),
    "a launcher in the defaults": (
        experiment("defaults:\n  - override hydra/launcher: submitit_local"),
        "override hydra/launcher",
    ),
    "a setting in one key": (experiment("hydra.run.dir: CANARY"), "hydra.run.dir"),
    "a long number": (experiment(f"seed: 0x{'f' * 20_000}"), "cannot be composed"),
    "a long decimal": (experiment(f"seed: {'9' * 5000}"), "not plain yaml"),
    "a long number on the command line": (word(f"seed={'9' * 5000}"), "cannot be composed"),
    "brackets on the command line": (word("model.args=" + "[" * 500), "vitrim: "),
    "Hydra's folder by the command line": (word("hydra.run.dir=CANARY"), "out=DIR"),
    "Hydra's subfolder by the command line": (word("hydra.output_subdir=CANARY"), "recipe.yaml"),
    "the runs' folder": (experiment("out: CANARY"), "out=DIR on the command line"),
    "the runs' folder above": (experiment("out: ../../x"), "out=../../x"),
    "the runs' folder at home": (experiment("out: ~/x"), "out=~/x"),
    "a checkpoint's folder": (
        experiment("trainer: {default_root_dir: CANARY}"),
        "trainer.default_root_dir",
    ),
    "a download": (experiment("data: {root: CANARY, download: true}"), "data.download=True"),
    # the environment
    "the environment": (experiment("tracking: ${oc.env:SECRET}"), "tracking=${oc.env:SECRET}"),
    "the environment, decoded": (
        experiment("tracking: '${oc.decode:${oc.env:SECRET}}'"),
        "tracking=${oc.decode:",
    ),
    "the environment, by pieces": (experiment("a: env\ntracking: '${oc.${a}:SECRET}'"), "tracking"),
    "the environment, as a name": (
        experiment("defaults:\n  - /model: ${oc.env:SECRET}"),
        "defaults: ${oc.env:SECRET}",
    ),
    "the environment, copied": (
        experiment("hydra: {job: {env_copy: [SECRET]}}"),
        "hydra.job.env_copy",
    ),
    "the environment, copied by the command line": (
        word("hydra.job.env_copy=[SECRET]"),
        "hydra.job.env_copy",
    ),
    "a variable that is missing": (word("hydra.job.env_copy=[NO_SUCH]"), "NO_SUCH"),
    "the environment on the command line": (word("tracking=${oc.env:SECRET}"), "the shell's $NAME"),
    "the environment as a choice": (word("experiment=${oc.env:SECRET}"), "the shell's $NAME"),
    "settings of Hydra": (experiment("tracking: ${hydra:runtime.cwd}"), "settings of Hydra"),
    "a dictionary's keys": (experiment("a: ${oc.dict.keys:model}"), "oc.dict.keys"),
    "a file by another way": (
        experiment("defaults:\n  - /../../../../etc/secret@_here_"),
        "secret",
    ),
    # what does not end
    "strings of strings": (experiment(STRINGS), "more than 131,072 values"),
    "strings of strings behind a link": (linked(STRINGS), "more than 131,072 values"),
    "nodes of nodes": (experiment(NODES), "more than 131,072 values"),
    "a node of itself": (experiment("a: {b: '${a}'}"), "refers to itself"),
    "a long chain": (experiment(CHAIN), "levels of references"),
    "aliases of merges behind a link": (linked(MERGES), "aliases written out"),
    "aliases of a long text": (experiment(LONG), "aliases written out"),
    "a made up time": (experiment("a: '${now:%999999999Y}'"), "a=${now:"),
    "a pipe": (special("pipe"), "Could not find 'experiment/evil'"),
    "a device": (special("device"), "Could not find 'experiment/evil'"),
    "a link to itself": (special("loop"), "evil"),
    "bytes": (special("bytes"), "evil.yaml"),
    "a large file": (special("large"), "65,536 bytes"),
    "two documents": (experiment("a: 1\n---\nb: 1"), "single document"),
    "the same key twice": (experiment("seed: 1\nseed: 2"), "duplicate key"),
    "a list": (experiment("- 1"), "expected keys and values"),
    # other ways in
    "a package in the header": (
        files(
            {"experiment/evil.yaml": "# @package hydra.job_logging\nroot: {level: DEBUG}"},
            "--config-dir=FOLDER/conf",
            "experiment=evil",
        ),
        "hydra.job_logging.root.level=DEBUG",
    ),
    "a package in the choice": (
        files(
            {"experiment/evil.yaml": "root: {level: DEBUG}"},
            "--config-dir=FOLDER/conf",
            "+experiment@hydra.job_logging=evil",
        ),
        "hydra.job_logging.root.level=DEBUG",
    ),
    "a package in the defaults": (
        files(
            {
                "experiment/evil.yaml": "defaults:\n  - other@hydra.run: x",
                "experiment/other/x.yaml": "dir: CANARY",
            },
            "--config-dir=FOLDER/conf",
            "experiment=evil",
        ),
        "other@hydra.run",
    ),
    "a group of Hydra": (
        files(
            {"hydra/job_logging/evil.yaml": "root: {level: DEBUG}"},
            "--config-dir=FOLDER/conf",
            "hydra/job_logging=evil",
        ),
        "hydra.job_logging.root.level=DEBUG",
    ),
    "a launcher with commands": (
        files(
            {"hydra/launcher/evil.yaml": "defaults: [slurm]\nsetup: [touch CANARY]"},
            "--config-dir=FOLDER/conf",
            "hydra/launcher=evil",
            "-m",
        ),
        "hydra.launcher.setup.0=touch",
    ),
    "a launcher with a line": (
        files(
            {"hydra/launcher/evil.yaml": 'defaults: [slurm]\npartition: "a\\ntouch CANARY"'},
            "--config-dir=FOLDER/conf",
            "hydra/launcher=evil",
            "-m",
        ),
        "hydra.launcher.partition=a\ntouch",
    ),
    "a launcher with a folder": (
        files(
            {"hydra/launcher/evil.yaml": "defaults: [slurm]\nsubmitit_folder: CANARY"},
            "--config-dir=FOLDER/conf",
            "hydra/launcher=evil",
            "-m",
        ),
        "hydra.launcher.submitit_folder",
    ),
    "parameters of a sweep": (experiment(PARAMS, "-m", "experiment=evil"), "hydra.sweeper.params"),
    "a mode of its own": (experiment("hydra: {mode: SOME}"), "hydra.mode"),
    "a place of files": (
        files(
            {"mine.yaml": "defaults: [run]\nhydra: {searchpath: ['pkg://evil']}"},
            "--config-dir=FOLDER/conf",
            "--config-name=mine",
        ),
        "hydra.searchpath",
    ),
    "a main file elsewhere": (
        files(
            {"mine.yaml": "defaults: [run]\nhydra: {verbose: true}"},
            "--config-name=FOLDER/conf/mine",
        ),
        "primary config",
    ),
    "a main file above": (word("--config-name=../../etc/passwd"), "passwd"),
    "a main folder": (
        files(
            {"run.yaml": "hydra: {output_subdir: ../x}"},
            "--config-path=FOLDER/conf",
        ),
        "hydra.output_subdir",
    ),
    "a main folder without settings of Hydra": (
        files({"run.yaml": "tracking: ${oc.env:SECRET}"}, "--config-path=FOLDER/conf"),
        "tracking=${oc.env:SECRET}",
    ),
    "a package of files": (module("hydra.searchpath=[pkg://evil]"), "pkg://evil"),
    "a main package": (module("--config-path=pkg://evil"), "pkg://evil"),
    "a place that is not there": (word("hydra.searchpath=[/no/such/folder]"), "no such folder"),
    "a pickle": (rerun("--experimental-rerun"), "experimental-rerun"),
    "a pickle, abbreviated": (rerun("--experimental"), "experimental-rerun"),
    "an experiment above": (word("experiment=../../x"), "x"),
    "a target in a strategy": (
        experiment("trainer:\n  strategy:\n    _target_: lightning.pytorch.loggers.CSVLogger"),
        "lightning.pytorch.loggers.CSVLogger",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_others_does_not_act(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made, expected = CASES[name]
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    arguments = made(tmp_path)
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(written(tmp_path))
    done = command(*arguments, "data=none")
    assert done.code == 1
    assert expected in done.message
    assert done.message.startswith("vitrim: ")
    assert SECRET not in done.message + done.output
    assert "Traceback" not in done.message
    assert len(done.message) < 2000
    assert set(written(tmp_path)) == before


def written(folder: Path) -> list[Path]:
    """Return what is in a folder, apart from configurations and the folder of runs."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return [path for path in paths if path.parts[0] not in ("conf", "outputs")]


PLAIN = "strength: 2\nsamples: ${strength}\nmodel:\n  num_classes: ${.training.epochs}\n"


@pytest.mark.parametrize(
    "made",
    [
        experiment("defaults:\n  - override /method: oneshot\n" + PLAIN),
        experiment("out: outputs/mine\n" + PLAIN),
        linked(PLAIN),
        files(
            {"mine.yaml": "defaults: [run, _self_]\n" + PLAIN},
            "--config-dir=FOLDER/conf",
            "--config-name=mine",
        ),
        files(
            {"hydra/launcher/mine.yaml": "defaults: [slurm]\npartition: gpu\nmem_gb: 64"},
            "--config-dir=FOLDER/conf",
            "hydra/launcher=mine",
        ),
        lambda folder: [f"--config-path={_copied(folder)}"],
    ],
)
def test_a_plain_file_is_composed(command: Command, tmp_path: Path, made: Made) -> None:
    done = command(*made(tmp_path), "--cfg", "job")
    assert done.code == 0, done.message
    assert "strength: " in done.output


def _copied(folder: Path) -> Path:
    for path in CONF.rglob("*.yaml"):
        copy = folder / "conf" / path.relative_to(CONF)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    return folder / "conf"

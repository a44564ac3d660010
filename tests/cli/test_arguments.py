"""Command lines in any order, with `~`, special characters, and in other encodings."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

import reports
from command import Command
from vitrim.cli.arguments import prepared, quoted
from vitrim.cli.compose import CONF
from vitrim.cli.report import main
from vitrim.errors import ConfigError, shortened

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("data=none -m strength=1,2", "-m data=none strength=1,2"),
        ("data=none --multirun", "--multirun data=none"),
        ("seed=1 --cfg job", "--cfg job seed=1"),
        ("seed=1 --config-dir a seed=2 -cn=b", "--config-dir a -cn=b seed=1 seed=2"),
        ("seed=1 --info defaults", "--info defaults seed=1"),
        ("seed=1 --info x=2", "--info seed=1 x=2"),
        ("a=1 --bad", "--bad a=1"),
        ("out=~/x data.root=~ model.name=~x", "out=HOME/x data.root=HOME model.name=~x"),
        ("--config-dir=~/c --config-path ~/p", "--config-dir=HOME/c --config-path HOME/p"),
        ("~method.tables +a=-1", "~method.tables +a=-1"),
    ],
)
def test_flags_come_first_and_paths_have_no_tilde(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepared(words.split()) == expected.replace("HOME", str(tmp_path)).split()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("out=a\0b", "expected text in one line"),
        ("out=/tmp/\udcff", r"out=/tmp/\\udcff: not UTF-8"),
        ("--experimental-rerun=x", "reads a pickle"),
        ("--exp", "reads a pickle"),
    ],
)
def test_arguments_that_cannot_work(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared([word])


PATHS = (
    "/a=b",
    "/a (b)",
    "/a#b",
    "/a,b",
    "/a  b",
    "/äöü",
    "/it's",
    '/a"b',
    "/a{b}",
    "/[a]b",
    "/a:b",
)


@pytest.mark.parametrize("path", PATHS)
def test_the_quoting_in_the_message_works(command: Command, path: str) -> None:
    word = f"data.root={path}"
    done = command("data=imagefolder", word, "--cfg", "job")
    if done.code:  # some need no quotes
        assert done.code == 1
        assert quoted(word) in done.message, done.message
        assert "Traceback" not in done.message
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("run", ["data=imagefolder", *shlex.split(quoted(word))])
    assert cfg.data.root == path


def test_another_locale_reads_and_writes_every_name(tmp_path: Path) -> None:
    words = ["-m", "vitrim", "--cfg", "job", f"out={tmp_path}/äöü"]
    environment = {**os.environ, **ASCII}
    done = subprocess.run([sys.executable, *words], capture_output=True, env=environment)
    if done.returncode:  # only the message is read here: it shows the quotes
        assert quoted(words[-1]) in done.stderr.decode()
    words[-1] = shlex.split(quoted(words[-1]))[0]
    done = subprocess.run([sys.executable, *words], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"out: {tmp_path}/äöü" in done.stdout.decode()


@pytest.mark.parametrize(
    "status", ['{"status": "FAILED", "reason": "\\udcff \\ud800"}', '"\udcff"']
)
def test_a_report_shows_names_and_reasons_that_are_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    reports.save(tmp_path / "done" / "run")
    named = reports.save(tmp_path / "done-\udcff" / "run")
    text = json.dumps({**reports.document(), "commit": "\ud800"})
    (named / "report.json").write_text(text)
    unfinished = tmp_path / "un\udcfe" / "run"
    unfinished.mkdir(parents=True)
    (unfinished / "recipe.yaml").write_text("seed: 0\n")
    (unfinished / "status.json").write_bytes(status.encode(errors="surrogateescape"))
    records = tmp_path / "sweeps"
    records.mkdir()
    for number, record in enumerate(("[]", "1", '{"job": 3}', '{"job": [null, {}], "status": []}')):
        (records / f"{number}.json").write_text(record)
    main([str(tmp_path), "--html", *reports.NO_WANDB])
    printed = capsys.readouterr().out
    assert r"un\udcfe" in printed
    assert "unfinished: " in printed


def test_a_long_message_is_shortened_where_it_is_long() -> None:
    message = f"model.name={'x' * 200_000}: no such network; similar names: a\nseed=-1: expected"
    short = shortened(message)
    assert len(short) < 1000
    assert short.startswith("model.name=xxx")
    assert "200,0" in short
    assert short.endswith("similar names: a\nseed=-1: expected")
    assert shortened("seed=-1: expected") == "seed=-1: expected"

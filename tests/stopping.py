"""Runs that are stopped by a signal, and what a report says but for times and places."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from command import Command, Done
from vitrim.files import WEIGHTS, sha256
from vitrim.trainer import resume


def stopped(
    command: Command, words: list[str], *, at: int | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[Done, int]:
    """Run a command that gets a signal at one of its checks for signals; return their number."""
    checks = 0

    def received() -> int | None:
        nonlocal checks
        checks += 1
        return signal.SIGTERM if at is not None and checks >= at else None

    with monkeypatch.context() as patch:
        patch.setattr(resume.signals, "received", received)
        return command(*words), checks


def resumed(command: Command, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the report of a run that was stopped a third of the way and resumed to the same bits.

    It is compared with that of the same command elsewhere, which nothing stops.
    """
    at_whole = [*words, f"out={command.out.with_name('whole')}"]
    whole, checks = stopped(command, at_whole, at=None, monkeypatch=monkeypatch)
    assert whole.code == 0, whole.message
    done, _ = stopped(command, words, at=checks // 3, monkeypatch=monkeypatch)
    assert done.code == 143, done.message
    again = command(*words)
    assert again.code == 0, again.message
    assert comparable(again.report) == comparable(whole.report)
    return again.report


def comparable(report: Path) -> dict[str, Any]:
    """Return the digest of the weights, and what a report says but for times and places."""
    numbers = json.loads(report.read_text())
    for side in ("dense", "compact"):
        for key in [key for key in numbers[side] if key.startswith(("latency", "blocks_ms"))]:
            del numbers[side][key]
    del numbers["seconds"]
    return {**numbers, "weights": sha256(report.parent / WEIGHTS)}

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


def comparable(report: Path) -> dict[str, Any]:
    """Return the digest of the weights, and what a report says but for times and places."""
    numbers = json.loads(report.read_text())
    for side in ("dense", "compact"):
        for key in [key for key in numbers[side] if key.startswith(("latency", "blocks_ms"))]:
            del numbers[side][key]
    del numbers["seconds"]
    return {**numbers, "weights": sha256(report.parent / WEIGHTS)}

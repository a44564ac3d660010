"""One job of a sweep, in a process of its own: what befalls it does not befall the others."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrim.errors import VitrimError
from vitrim.jobs import signals
from vitrim.jobs.status import COPY, STATUS, put, read

FOLDER = "sweeps"
_GRACE = 60.0  # seconds to save in, once told to stop, if its time was not shorter


class JobError(VitrimError):
    """A job of a sweep that did not come to its end."""


def job(words: Sequence[str], *, out: Path, minutes: float | None) -> str:
    """Run `vitrim` with `words` and return the path of its report.

    What became of it stands in `out`/sweeps/, a file a job. A request to stop is passed on.

    Args:
        words: the command line of the job.
        out: root of the run folders.
        minutes: after which the job is stopped; None: never.

    Raises:
        JobError: it failed, was killed, or took too long.
        Preempted: this process was told to stop; the job has saved.
    """
    signals.check()
    record = out / FOLDER / f"{_name(words)}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch) / STATUS
        put(record, {"job": list(words), "status": "RUNNING"})
        code, late = _finished(words, told, minutes)
        said = read(told)
        if code == 0:
            status, reason = "DONE", ""
        elif said.get("status") == "PREEMPTED" and not late:
            status, reason = "PREEMPTED", said["reason"]
        else:
            status, reason = "FAILED", _reason(code, said, late=late, minutes=minutes)
            if "folder" in said:
                put(Path(said["folder"]) / STATUS, {**said, "status": status, "reason": reason})
        put(record, {**said, "job": list(words), "status": status, "reason": reason})
    signals.check()
    if status != "DONE":
        raise JobError(f"{' '.join(words)}: {reason}")
    return str(Path(said["folder"]) / "report.json")


def _finished(words: Sequence[str], told: Path, minutes: float | None) -> tuple[int, bool]:
    """Return the exit code of the job, and whether it was stopped for taking too long."""
    child = subprocess.Popen(
        [sys.executable, "-m", "vitrim", *words],
        env={**os.environ, COPY: str(told), signals.PARENT: str(os.getpid())},
        start_new_session=True,  # Ctrl-C reaches this process, which passes it on once
    )
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    kill_at: float | None = None
    late = False
    while child.poll() is None:
        time.sleep(0.05)
        now = time.monotonic()
        if kill_at is None:
            late = deadline is not None and now > deadline
            signum = signal.SIGTERM if late else signals.noted()
            if signum is not None:
                child.send_signal(signum)
                kill_at = now + min(_GRACE, 60 * (minutes or 1)) if late else float("inf")
        elif now > kill_at:
            child.kill()
    return child.returncode, late


def _reason(code: int, said: dict[str, Any], *, late: bool, minutes: float | None) -> str:
    if late:
        return f"not finished after {minutes:g} minutes (sweep.minutes)"
    if said.get("status") == "FAILED":
        return str(said["reason"])
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _name(words: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:12]

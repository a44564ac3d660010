"""One job of a sweep in a process of its own: a failing job does not affect the others."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vitrim.errors import VitrimError
from vitrim.jobs import signals
from vitrim.jobs.forked import Forked
from vitrim.jobs.status import STATUS, STATUS_COPY, SWEEPS, read_status, write_json

_GRACE = 60.0  # seconds to save in after the time is up; never more than that time itself


class JobError(VitrimError):
    """A job of a sweep that did not finish."""


class Place(NamedTuple):
    """What a job gets besides its arguments.

    Args:
        environment: variables of its environment.
        words: further arguments.
        forked: whether it is a fork of a process that has imported all libraries, not a new one.
    """

    environment: Mapping[str, str]
    words: Sequence[str]
    forked: bool = False


ALONE = Place({}, ())


def refuse_nested() -> None:
    """Raise JobError in a job of a sweep, which must not start jobs of its own."""
    if STATUS_COPY in os.environ:
        raise JobError("a job of a sweep cannot be a sweep: remove hydra.mode=MULTIRUN")


def run_job(
    arguments: Sequence[str],
    *,
    out: Path,
    minutes: float | None,
    place: Place = ALONE,
) -> str:
    """Run `vitrim` with `arguments` and return the path of its report.

    A file per job in `out`/sweeps/ records how it ended. A request to stop is passed on.

    Args:
        arguments: the command line of the job.
        out: root of the run folders.
        minutes: after which the job is stopped; None: never.
        place: what the job gets besides.

    Raises:
        JobError: the job failed, was killed, or took too long.
        Preempted: this process was asked to stop; the job has saved.
    """
    signals.raise_if_stopped()
    record = out / SWEEPS / f"{_digest(arguments)}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / STATUS
        write_json(record, {"job": list(arguments), "status": "RUNNING"})
        variables = {**place.environment, STATUS_COPY: str(copy)}
        start = Forked if place.forked else _new
        job = start([*arguments, *place.words], {**os.environ, **variables})
        code, timed_out = _waited(job, minutes)
        child = read_status(copy)
    status, reason = _outcome(code, child, timed_out=timed_out, minutes=minutes)
    if status == "FAILED" and "folder" in child:
        write_json(
            Path(str(child["folder"])) / STATUS, {**child, "status": status, "reason": reason}
        )
    write_json(record, {**child, "job": list(arguments), "status": status, "reason": reason})
    signals.raise_if_stopped()
    if status != "DONE":
        raise JobError(f"{' '.join(arguments)}: {reason}")
    return str(Path(str(child["folder"])) / "report.json")


def _new(arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a job as a new process."""
    return subprocess.Popen(
        [sys.executable, "-m", "vitrim", *arguments],
        env={**environment, signals.PARENT: str(os.getpid())},
        start_new_session=True,  # Ctrl-C reaches this process, which passes it on once
    )


def _waited(child: subprocess.Popen[bytes] | Forked, minutes: float | None) -> tuple[int, bool]:
    """Return the exit code of a job, and whether it was stopped because it took too long."""
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    kill_at: float | None = None
    timed_out = False
    while child.poll() is None:
        time.sleep(0.05)
        now = time.monotonic()
        if kill_at is None:
            timed_out = deadline is not None and now > deadline
            signum = signal.SIGTERM if timed_out else signals.received()
            if signum is not None:
                child.send_signal(signum)
                kill_at = now + min(_GRACE, 60 * (minutes or 1)) if timed_out else float("inf")
        elif now > kill_at:
            child.kill()
    return child.returncode, timed_out


def _outcome(
    code: int, child: Mapping[str, object], *, timed_out: bool, minutes: float | None
) -> tuple[str, str]:
    """Return the status of a job that ended, and the reason, from its exit code and status."""
    if code == 0:
        return "DONE", ""
    if timed_out:
        return "FAILED", f"not finished after {minutes:g} minutes (sweep.minutes)"
    if child.get("status") in ("PREEMPTED", "FAILED"):
        return str(child["status"]), str(child["reason"])
    return "FAILED", f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _digest(arguments: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(arguments)).encode()).hexdigest()[:12]

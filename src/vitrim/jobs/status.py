"""The state of a run: status.json in its folder, written from the first moment on.

The state is RUNNING, DONE, FAILED with the reason, or PREEMPTED. A run that was killed still says
RUNNING, but no process holds its lock.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from vitrim.files import printable, read_bytes, write
from vitrim.jobs.signals import Preempted

_log = logging.getLogger(__name__)
STATUS = "status.json"
LOCK = ".lock"
"""File in a folder that a run holds while it works there (`vitrim.jobs.lock`)."""
SWEEPS = "sweeps"
"""Folder below the root of the run folders, with a record of every job of a sweep."""
STATUS_COPY = "VITRIM_STATUS"
"""Environment variable: a file that gets a copy of the status; the sweep reads it."""
_MAX_BYTES = 2**22  # of a status file, whose reason can name every bad image


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Record that a run works in `folder`, and at the end how it ended."""
    write_status(folder, "RUNNING")
    try:
        yield
    except Preempted as error:
        write_status(folder, "PREEMPTED", str(error))
        raise
    except BaseException as error:
        write_status(folder, "FAILED", f"{type(error).__name__}: {error}")
        raise
    write_status(folder, "DONE")


def write_status(folder: Path, status: str, reason: str = "") -> None:
    """Write the status; a failure to write is only logged, since no result depends on the file."""
    content = {
        "status": status,
        "reason": reason,
        "folder": str(folder),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
    }
    for path in (folder / STATUS, os.environ.get(STATUS_COPY)):
        try:
            if path is not None:
                write_json(Path(path), content)
        except OSError as error:
            _log.warning("%s: not written (%s)", path, error)


def write_refusal(reason: str) -> None:
    """Write for the sweep, if there is one, why this job did not start."""
    path = os.environ.get(STATUS_COPY)
    if path is not None and not read_status(Path(path)):
        write_json(Path(path), {"status": "FAILED", "reason": reason})


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Replace `path` by a JSON object in one step."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write(path, lambda part: part.write_text(text))


def read_status(path: Path) -> dict[str, object]:
    """Return the content of a status file; empty where it is missing, damaged or too large."""
    with suppress(OSError, ValueError, RecursionError):
        content = printable(json.loads(read_bytes(path, _MAX_BYTES)))
        if isinstance(content, dict):
            return content
    return {}


def status_of(folder: Path) -> tuple[str, str]:
    """Return the status of a folder without a report, and the reason, which may be empty.

    The status is "unfinished" where status.json has none, and "killed" where it is RUNNING but no
    process holds the folder's lock.
    """
    content = read_status(folder / STATUS)
    if "status" not in content:
        return "unfinished", f"{STATUS} cannot be read" if (folder / STATUS).exists() else ""
    if content["status"] != "RUNNING":
        return str(content["status"]), str(content.get("reason") or "")
    if _is_locked(folder):
        return "RUNNING", ""
    return "killed", f"{STATUS} is RUNNING without a process; run the same command to resume"


def _is_locked(folder: Path) -> bool:
    """Whether a run holds the lock of `folder`, or that cannot be known.

    A lock that is no regular file, as a link in somebody else's folder, is not opened.
    """
    lock = folder / LOCK
    if not lock.is_symlink() and not lock.exists():
        return False
    if lock.is_symlink() or not lock.is_file():
        return True
    try:
        with FileLock(lock, timeout=0):
            return False
    except (Timeout, OSError):
        return True


def unfinished_lines(unfinished: Sequence[Path], roots: Sequence[Path]) -> list[str]:
    """Return a line for every run without a report, and for every job of a sweep without a run."""
    lines = [f"{printable(str(folder))}: {_line(*status_of(folder))}" for folder in unfinished]
    for root in roots:
        for record in map(read_status, sorted(root.glob(f"{SWEEPS}/*.json"))):
            if record.get("status") != "DONE" and "folder" not in record:
                job = record.get("job")
                arguments = " ".join(map(str, job)) if isinstance(job, list) else ""
                status, reason = record.get("status"), record.get("reason", "")
                lines.append(f"{arguments}: {status} {reason}".rstrip())
    return lines


def _line(status: str, reason: str) -> str:
    separator = " " if status.isupper() else ": "  # a word of the run's file, or one of ours
    return f"{status}{separator}{reason}" if reason else status

"""What became of a run: status.json in its folder, there from the first moment on.

RUNNING, DONE, FAILED with the reason, or PREEMPTED. A run that was killed still says RUNNING, but
nobody holds its lock.
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
from typing import Any

from filelock import FileLock, Timeout

from vitrim.files import write
from vitrim.jobs.signals import Preempted

_log = logging.getLogger(__name__)
STATUS = "status.json"
COPY = "VITRIM_STATUS"
"""Environment variable: a file that is told, too; the sweep looks at it."""
_MAX_BYTES = 2**22  # of a status file, whose reason can name every bad image


@contextmanager
def told(folder: Path) -> Iterator[None]:
    """Say that a run works in `folder`, and in the end how it went."""
    tell(folder, "RUNNING")
    try:
        yield
    except Preempted as error:
        tell(folder, "PREEMPTED", str(error))
        raise
    except BaseException as error:
        tell(folder, "FAILED", f"{type(error).__name__}: {error}")
        raise
    tell(folder, "DONE")


def tell(folder: Path, status: str, reason: str = "") -> None:
    """Write the status; where that fails, go on: it is a record, nothing is computed from it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    said = {
        "status": status,
        "reason": reason,
        "folder": str(folder),
        "time": now,
        "host": socket.gethostname(),
    }
    for path in (folder / STATUS, os.environ.get(COPY)):
        try:
            if path is not None:
                put(Path(path), said)
        except OSError as error:
            _log.warning("%s: not written (%s)", path, error)


def refused(reason: str) -> None:
    """Tell the sweep, if there is one, why this job did not even begin."""
    path = os.environ.get(COPY)
    if path is not None and not read(Path(path)):
        put(Path(path), {"status": "FAILED", "reason": reason})


def put(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by a JSON object in one step."""
    text = json.dumps(value, indent=1, sort_keys=True)
    write(path, lambda part: part.write_text(text))


def missing(unfinished: Sequence[Path], roots: Sequence[Path]) -> list[str]:
    """Return a line for every run that has no report, and every job of a sweep that has no run."""
    lines = [f"{folder}: {_line(*became(folder))}" for folder in unfinished]
    for root in roots:
        for record in map(read, sorted(root.glob("sweeps/*.json"))):
            if record.get("status") != "DONE" and "folder" not in record:
                words = " ".join(map(str, record.get("job", ())))
                lines.append(f"{words}: {record.get('status')} {record.get('reason', '')}".rstrip())
    return lines


def _line(status: str, reason: str) -> str:
    between = " " if status.isupper() else ": "  # in the words of the run, or in ours
    return f"{status}{between}{reason}" if reason else status


def became(folder: Path) -> tuple[str, str]:
    """Return the status of a folder without a report, and the reason, which may be empty.

    Where status.json does not tell, the status is "unfinished"; "killed", where it says RUNNING
    and nobody works there.
    """
    said = read(folder / STATUS)
    if "status" not in said:
        return "unfinished", f"{STATUS} cannot be read" if (folder / STATUS).exists() else ""
    if said["status"] != "RUNNING":
        return str(said["status"]), str(said.get("reason") or "")
    try:
        with FileLock(folder / ".lock", timeout=0):
            return "killed", "it says RUNNING, and nobody holds its lock; the same command goes on"
    except (Timeout, OSError):
        return "RUNNING", ""


def read(path: Path) -> dict[str, Any]:
    """Return what a status file says; nothing where it is missing, damaged or too large."""
    with suppress(OSError, ValueError, RecursionError), path.open("rb") as file:
        found = json.loads(file.read(_MAX_BYTES))
        if isinstance(found, dict):
            return found
    return {}

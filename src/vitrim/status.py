"""What became of a run: status.json in its folder, there from the first moment on.

RUNNING, DONE, FAILED with the reason, or PREEMPTED. A run that was killed still says RUNNING, but
nobody holds its lock.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vitrim.signals import Preempted

_log = logging.getLogger(__name__)
STATUS = "status.json"
COPY = "VITRIM_STATUS"
"""Environment variable: a file that is told, too; the sweep looks at it."""


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


def put(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by a JSON object in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Return what a status file says; nothing where it is missing or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
    return {}

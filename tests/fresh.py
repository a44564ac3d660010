"""Python processes that share nothing with the tests, and start in a second instead of ten.

A new interpreter imports torch and the libraries that go with it, but nothing of vitrim. Every
process is a fork of it.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vitrim.jobs.signals import PARENT

_SERVER = """
import json, os, runpy, signal, sys
import lightning.pytorch, safetensors.torch, sklearn.datasets, timm, torch
import torch.utils.flop_counter, torchmetrics, torchvision.transforms.v2

def run(words):
    kind, name, *rest = words if words[0] in ("-c", "-m") else ("", *words)
    sys.argv = [kind if kind == "-c" else name, *rest]
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path.insert(0, os.getcwd())
        exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, os.path.dirname(name))
        runpy.run_path(name, run_name="__main__")

print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if isinstance(task, int):
        ended, status = os.waitpid(task, os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if ended else None, flush=True)
        continue
    words, cwd, env, files = task
    child = os.fork()
    if not child:
        os.setsid()
        for number, path in enumerate((os.devnull, *files)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
        run(words)
        sys.exit()
    print(child, flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    """Start the interpreter; it ends with this process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        cwd=tempfile.gettempdir(),
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    atexit.register(server.communicate)
    return server


_talk = threading.RLock()


def _ask(task: object) -> int | None:
    with _talk:
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline().strip()
    return None if answer == "None" else int(answer)


class Popen:
    """What `subprocess.Popen` is to its caller, for `[sys.executable, word ...]`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        files: Sequence[str] = (os.devnull, os.devnull),
        **_: Any,
    ) -> None:
        env = {**(os.environ if env is None else env)}
        if PARENT in env:  # the process is a child of the interpreter
            with _talk:
                env[PARENT] = str(_server().pid)
        pid = _ask([command[1:], str(cwd or Path.cwd()), env, files])
        assert pid is not None
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        if self.returncode is None:
            self.returncode = _ask(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait so many seconds for the end, kill what still runs, and return the exit code."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                deadline = float("inf")
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(9)


def python(
    *words: str, cwd: Path | None = None, timeout: float = 300.0, **env: str
) -> subprocess.CompletedProcess[str]:
    """Return what `python words ...` does: a file, `-m module` or `-c text`, and its arguments.

    Args:
        words: the arguments of Python.
        cwd: where it runs.
        timeout: in seconds, after which it is killed.
        env: variables besides those of this process.
    """
    (done,) = together([words], cwd=cwd, timeout=timeout, env=[env])
    return done


def together(
    commands: Sequence[Sequence[str]],
    *,
    env: Sequence[Mapping[str, str]],
    cwd: Path | None = None,
    timeout: float = 300.0,
) -> list[subprocess.CompletedProcess[str]]:
    """Return what several commands do that run at once, each with an environment of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        logs = [
            [str(Path(scratch) / f"{number}.{kind}") for kind in ("out", "err")]
            for number, _ in enumerate(commands)
        ]
        processes = [
            Popen([sys.executable, *words], env={**os.environ, **more}, cwd=cwd, files=files)
            for words, more, files in zip(commands, env, logs, strict=True)
        ]
        codes = [process.wait(timeout) for process in processes]
        texts = [[Path(file).read_text() for file in files] for files in logs]
    return [
        subprocess.CompletedProcess([*words], code, *text)
        for words, code, text in zip(commands, codes, texts, strict=True)
    ]

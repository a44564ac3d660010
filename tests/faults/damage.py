"""Files that are damaged, or half written: every one has to be noticed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitrim.errors import VitrimError
from vitrim.files import verify
from vitrim.store import load, read_tensors
from vitrim.trainer.resume import STATE, SafeCheckpointIO, newest


def during_saves(n: int, work: Path, seed: int) -> dict[str, int]:
    """Kill a process that saves checkpoints all the time; the newest has to be whole."""
    generator = random.Random(seed)
    folder = work / "saves"
    found = Counter(kills=0, unreadable=0, older=0)
    SafeCheckpointIO().save_checkpoint(_state(0), folder / f"{0:09d}")
    for at in range(1, n + 1):
        pid = os.fork()
        if pid == 0:
            io = SafeCheckpointIO()
            for step in range(at * 1000, (at + 1) * 1000):
                io.save_checkpoint(_state(step), folder / f"{step:09d}")
                for old in sorted(folder.glob("*"))[:-2]:
                    shutil.rmtree(old, ignore_errors=True)
        time.sleep(generator.uniform(0.005, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found["kills"] += 1
        whole = newest(folder)
        if whole is None:
            found["unreadable"] += 1
            SafeCheckpointIO().save_checkpoint(_state(0), folder / f"{0:09d}")
            continue
        read = SafeCheckpointIO().load_checkpoint(whole)
        found["unreadable"] += not torch.equal(read["weight"], _state(int(whole.name))["weight"])
        found["older"] += not int(whole.name) >= at * 1000
    return dict(found)


def _state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(1000, 100, generator=generator), "step": step}


def damaged(n: int, run: Path, phase: Path, work: Path, seed: int) -> dict[str, int]:
    """Flip bits in, and truncate, every kind of file that is loaded; count silent loads.

    Args:
        n: damages in all.
        run: the folder of a finished run.
        phase: the folder of a finished phase.
        work: a folder for copies.
        seed: of the damages.
    """
    generator = random.Random(seed)
    checkpoint = work / "checkpoint" / "000000007"
    SafeCheckpointIO().save_checkpoint(_state(7), checkpoint)
    kinds: list[tuple[Path, str, Callable[[Path], Any]]] = [
        *((run, name, load) for name in ("plan.json", "model.safetensors", "manifest.json")),
        *((phase, name, _phase) for name in ("state.safetensors", "manifest.json")),
        *(
            (checkpoint, name, SafeCheckpointIO().load_checkpoint)
            for name in (STATE, "manifest.json")
        ),
    ]
    found = Counter(damages=0, silent=0)
    for at in range(n):
        source, name, read = kinds[at % len(kinds)]
        folder = work / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in source.iterdir():
            if file.is_file() and file.suffix in (".json", ".safetensors", ".ckpt"):
                (folder / file.name).hardlink_to(file)
        content = bytearray((source / name).read_bytes())
        if generator.random() < 0.8:
            place = generator.randrange(8 * len(content))
            content[place // 8] ^= 1 << place % 8
        else:
            del content[generator.randrange(len(content)) :]
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        found["damages"] += 1
        try:
            read(folder)
        except VitrimError:
            continue
        found["silent"] += 1
        found[f"silent {name}"] += 1
    return dict(found)


def _phase(folder: Path) -> Any:
    verify(folder, ("state.safetensors",))
    return read_tensors(folder / "state.safetensors")

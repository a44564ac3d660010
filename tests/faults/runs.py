"""Whole runs that are killed, told to stop, or out of disk, again and again until they end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits

from vitrim.cli.app import main
from vitrim.files import sha256
from vitrim.jobs.signals import CODES
from vitrim.store import load

QUICK = (
    "strength=3",
    "model.training.epochs=3",
    "method.gating.epochs=2",
    "method.fine_tuning.epochs=3",
    "data.batch_size=256",
    "latency.repeats=1",
    "tracking=none",
    "progress=false",
    "checkpoint.minutes=0",
)
EPOCHS = [word.partition("=")[0] for word in QUICK if "epochs" in word]
MINUTES = float("inf")
"""A row of kills ends after so many minutes, too."""
WEIGHTS = "*/s3-*/model.safetensors"
import_module("vitrim.pipeline")  # before the forks, each of which would import it


def shortened(words: Sequence[str]) -> list[str]:
    """Return the words of a run with every phase one epoch long."""
    kept = [word for word in words if word.partition("=")[0] not in EPOCHS]
    return [*kept, *(f"{key}=1" for key in EPOCHS)]


def attempt(words: Sequence[str], *, after: float | None, signum: int) -> int:
    """Run the command in a fork, signalled after so many seconds; return its exit code."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code: object = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            torch.set_num_threads(1)
            sys.argv = ["vitrim", *words]
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code if isinstance(code, int) else 1)
    deadline = None if after is None else time.monotonic() + after
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signum)
            deadline = None
        time.sleep(0.005)


def uninterrupted(work: Path, seed: int, words: Sequence[str] | None = None) -> tuple[Path, float]:
    """Return the folder of a run that nothing happened to, and the seconds it took; run it once."""
    whole = work / f"whole-{seed}{'' if words is None else '-few'}"
    took = whole / "seconds"
    if not took.is_file():
        begun = time.monotonic()
        attempt((*(words or QUICK), f"seed={seed}", f"out={whole}"), after=None, signum=0)
        took.write_text(str(time.monotonic() - begun))
    return whole, float(took.read_text())


def interrupted(
    n: int,
    signums: Sequence[int],
    allowed: Sequence[int],
    work: Path,
    seed: int,
    words: Sequence[str] | None = None,
) -> dict[str, int]:
    """Interrupt runs `n` times in all, each until it ends; count what came of it."""
    generator, begun = random.Random(seed), time.monotonic()
    found: Counter[str] = Counter(runs=0, kills=0, lost=0, different=0, wrong_codes=0)
    while more(found["kills"], n, begun):
        of_run = (*(words or QUICK), f"seed={found['runs'] % 2}")
        whole, seconds = uninterrupted(work, found["runs"] % 2, words)
        out = work / f"run-{found['runs']}"
        code, tries = 1, 0
        while code != 0 and tries < 50:
            stop = more(found["kills"], n, begun)
            # later and later, so that slow machines reach the end as well
            after = generator.uniform(0.1, 1 + tries / 10) * seconds if stop else None
            code = attempt((*of_run, f"out={out}"), after=after, signum=generator.choice(signums))
            tries += 1
            if code != 0:
                found["kills"] += 1
                found[_stage(out)] += 1
                found["wrong_codes"] += code not in allowed
        found["runs"] += 1
        found["lost"] += code != 0
        found["different"] += not contents(whole) or contents(out) != contents(whole)
        shutil.rmtree(out, ignore_errors=True)
    return dict(found)


def more(kills: int, n: int, begun: float) -> bool:
    """Whether something is still to be killed, of `n` in all, by a row that began then."""
    return kills < n and time.monotonic() - begun < 60 * MINUTES


def contents(out: Path) -> dict[str, str]:
    """Return the checksums of the results below `out`: networks, and lists of drawn images."""
    files = [path for name in ("model.safetensors", "samples.txt") for path in out.rglob(name)]
    return {
        str(path.relative_to(out)): sha256(path) for path in files if "phases" not in path.parts
    }


def _stage(out: Path) -> str:
    """Return the phase that an interrupted run was in."""
    ended = {path.parent.name.split("-")[0] for path in out.glob("phases/*/manifest.json")}
    ended |= {path.parent.name for path in out.glob("*/s3-*/phases/*/manifest.json")}
    order = ("dense", "score", "classify")
    return next((f"in {name}" for name in order if name not in ended), "at the end")


def kills(n: int, work: Path, seed: int) -> dict[str, int]:
    """Kill -9 at random moments in every phase."""
    return interrupted(n, [signal.SIGKILL], [-signal.SIGKILL], work, seed)


def kills_of_few_images(n: int, work: Path, seed: int) -> dict[str, int]:
    """Kill -9 at random moments while a few images, drawn from files, are trained on."""
    root = work / "images"
    if not root.is_dir():
        _write_digits(root)
    kept = [word for word in QUICK if not word.startswith("data.")]
    words = (
        *(*kept, "model.args.in_chans=3", "data=imagefolder", f"data.root={root}"),
        *("data.samples=40", "data.workers=0", "data.batch_size=16"),
    )
    return interrupted(n, [signal.SIGKILL], [-signal.SIGKILL], work, seed, words)


def _write_digits(root: Path) -> None:
    """Write 20 digits of each class for training, and 5 for validation, as files."""
    digits = load_digits()
    for label in range(10):
        images = digits.images[digits.target == label][:25]
        for number, image in enumerate(images):
            folder = root / ("train" if number < 20 else "val") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray((15 * image).astype("uint8"))
            pixels.convert("RGB").save(folder / f"{number}.png")


def requests(n: int, work: Path, seed: int) -> dict[str, int]:
    """Ask to stop by any of the four signals, at random moments."""
    return interrupted(n, [*CODES], [*CODES.values()], work, seed)


@contextmanager
def small_disk(megabytes: float) -> Iterator[Path]:
    """Give a folder on a file system of its own, of that size; needs the right to mount."""
    folder = Path(tempfile.mkdtemp())
    size = f"size={int(megabytes * 2**20)}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def full_disks(sizes: Sequence[float], work: Path) -> dict[str, int]:
    """Run on disks of too few megabytes; when there is room, the same command has to end it."""
    whole, _ = uninterrupted(work, 0)
    found = Counter(runs=0, failed=0, lost=0, different=0)
    for size in sizes:
        with small_disk(size) as disk:
            words = (*QUICK, "seed=0", f"out={disk}/o")
            found["failed"] += attempt(words, after=None, signum=0) != 0
            subprocess.run(["mount", "-o", "remount,size=1G", disk], check=True)
            code = attempt(words, after=None, signum=0)
            one, other = (next(folder.glob(WEIGHTS), None) for folder in (disk / "o", whole))
            found["runs"] += 1
            found["lost"] += code != 0
            found["different"] += (
                one is None or other is None or sha256(one) != sha256(other) or not load(one.parent)
            )
    return dict(found)


FATES = {"raise": 5, "exit": 3, "kill": 3, "term": 2, "hang": 2}
"""What happens to how many of 30 jobs."""


def sweep(jobs: int, fates: dict[str, int], work: Path, *, minutes: float) -> dict[str, int]:
    """Run a sweep whose jobs meet their fates, then the same again without; count the ends."""
    out = work / "sweep"
    met = [fate for fate, n in fates.items() for _ in range(n)]
    by_seed = dict(zip(random.Random(0).sample(range(jobs), len(met)), met, strict=True))
    inject = Path(__file__).parent / "inject"
    path = os.pathsep.join([str(inject), os.environ.get("PYTHONPATH", "")])
    words = shortened([*QUICK, f"out={out}", f"sweep.minutes={minutes}"])
    command = [sys.executable, "-m", "vitrim", "-m", *words]
    seeds = f"seed={','.join(map(str, range(jobs)))}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(
        [*command, seeds],
        env={**environment, "VITRIM_FATES": json.dumps(by_seed)},
        capture_output=True,
    )
    done = {file.parent.name for file in out.glob("*/s3-*/report.json")}
    states = Counter(json.loads(p.read_text())["status"] for p in out.glob("sweeps/*.json"))
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/s3-*/report.json")}
    second = subprocess.run([*command, seeds], env=environment, capture_output=True)
    after = {file: file.stat().st_mtime_ns for file in out.glob("*/s3-*/report.json")}
    return {
        "jobs": jobs,
        "fates": len(met),
        "done": len(done),
        "FAILED": states["FAILED"],
        "PREEMPTED": states["PREEMPTED"],
        "first code": first.returncode,
        "done by second": len(after) - len(before),
        "repeated": sum(after[file] != time for file, time in before.items()),
        "second code": second.returncode,
        "lost": jobs - len(after) + (len(done) != jobs - len(met)),
    }

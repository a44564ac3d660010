"""`python -m tests.faults`: what runs go through, and what is left of them, as a table.

Kills at random moments: of runs, of runs on few image files, of saves, of sweeps and of one of two
processes; requests to stop, full disks, damaged files, hostile files, a sweep whose jobs fail in
every way, and random plans, cut against masked (`tests.faults.cuts`). `--share 0.05` does a
twentieth of it, with shorter runs, apart from what has a number of its own.

A row says how often something was killed, how many runs did not end when they were repeated
(lost), and how many ended with other weights than without a fault (different).
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
_OTHER = Path("/dev/shm")  # a file system that is not that of the runs
BAD = (
    "lost",
    "different",
    "wrong_codes",
    "unreadable",
    "silent",
    "repeated",
    "hung",
    "wrong_counts",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="kills of whole runs (200)")
    parser.add_argument("--minutes", type=float, help="that a row of kills may take")
    parser.add_argument("--damages", type=int, default=100_000, help="of files (100,000)")
    parser.add_argument("--cases", type=int, default=5000, help="plans that are cut (5,000)")
    parser.add_argument("--share", type=float, default=1.0, help="of everything else (1)")
    parser.add_argument("--only", default="", help="comma-separated rows")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if _OTHER.is_dir():
        os.environ["TMPDIR"] = str(_OTHER)
    from tests.faults import cuts, damage, processes, runs

    if chosen.share < 1:
        runs.QUICK = tuple(runs.shortened(runs.QUICK))
    runs.MINUTES = chosen.minutes or runs.MINUTES
    torch.set_num_threads(1)
    logging.getLogger("vitrim").setLevel(logging.ERROR)  # of every save that was cut short
    work = Path(tempfile.mkdtemp(dir=Path.cwd(), prefix=".faults-"))

    def share(n: int) -> int:
        return max(1, round(n * chosen.share))

    def some_damage() -> dict[str, int]:
        whole, _ = runs.uninterrupted(work, 0)
        run = next(whole.glob(runs.WEIGHTS)).parent
        phase = next(whole.glob("phases/score-*"))
        return damage.damaged(chosen.damages, run, phase, work, chosen.seed)

    def a_sweep() -> dict[str, int]:
        if chosen.share >= 1:
            return runs.sweep(30, runs.FATES, work, minutes=2.0)
        return runs.sweep(4, {"exit": 1, "kill": 1, "term": 1}, work, minutes=5.0)

    few = max(1, chosen.kills // 20)
    rows: dict[str, Callable[[], Mapping[str, object]]] = {
        "kill -9 anywhere": lambda: runs.kills(chosen.kills, work, chosen.seed),
        "kill -9 of few images": lambda: runs.kills_of_few_images(
            max(1, chosen.kills // 4), work, chosen.seed
        ),
        "kill -9 in a sweep": lambda: processes.sweeps(few, work, chosen.seed),
        "kill -9 of one of two": lambda: processes.ranks(few, work, chosen.seed),
        "kill -9 while saving": lambda: damage.during_saves(share(300), work, chosen.seed),
        "requests to stop": lambda: runs.requests(share(100), work, chosen.seed),
        "full disk": lambda: runs.full_disks([0.3, 0.6, 1.2, 2.0, 3.0][: share(5)], work),
        "damaged files": some_damage,
        "hostile files": _hostile,
        "a sweep": a_sweep,
        "cut against masked": lambda: cuts.check(chosen.cases, chosen.seed).row(),
    }
    wanted = [name.strip() for name in chosen.only.split(",") if name.strip()] or [*rows]
    failed = False
    try:
        for name in wanted:
            if name == "full disk" and os.geteuid() != 0:
                print(f"{name:22} not run: mounting a small disk needs root", flush=True)
                continue
            found = {"kills": 0, "lost": 0, "different": 0, **rows[name]()}
            bad = any(value for key, value in found.items() if key.split(" ")[0] in BAD)
            failed |= bad
            text = ", ".join(f"{key} {value}" for key, value in found.items())
            print(f"{name:22} {'FAILED' if bad else 'ok':7} {text}", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(failed)


def _hostile() -> dict[str, int]:
    tests = Path(__file__).parents[1] / "cli" / "test_guard.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", str(tests)],
        capture_output=True,
        text=True,
    )
    last = done.stdout.strip().splitlines()[-1]
    print(f"  {last}", flush=True)
    return {"silent": int(done.returncode != 0)}


if __name__ == "__main__":
    main()

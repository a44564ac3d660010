"""The start of a run on many image files: empty ones in 1000 folders, made and removed here.

`python -m tests.bench listing --images 1280000` takes ImageNet's number, and writes as many empty
files; 100,000 by default.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .timing import Row

CLASSES = 1000
IMAGES = 100_000
"""Training images; `--images` says how many."""
START_S, WORKER_MB = 5.0, 60.0
"""Bars, which stand for ImageNet's number of images: `--images 1281167`."""
_OPEN = """
import gc, json, os, sys, time
from pathlib import Path
import torch
from vitrim.data.content import content
from vitrim.data.description import describe_images
from vitrim.data.imagefolder import image_folder
from vitrim.data.loader import ResumableBatchSampler
from vitrim.data.quarantine import StrictDataset, TolerantDataset

def own_mb():
    gc.collect()
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(row.split()[1]) for row in text.splitlines() if row.startswith("Private")) / 1e3

before, begun = own_mb(), time.perf_counter()
off = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0}
images = image_folder(
    root=sys.argv[1], train="train", val="val", classes=None, class_seed=0, samples=None,
    samples_seed=0, batch_size=64, workers=0, augmentation={}, mixing=off,
    bad_images={"limit": 0.01, "evaluation": "fail"},
)
opened = time.perf_counter()
content(images), describe_images(images)
ended = time.perf_counter()
order = iter(ResumableBatchSampler(len(images.train), batch_size=64, seed=0, shuffle=True))
next(order)
mb = own_mb() - before
read, write = os.pipe()
if not os.fork():  # a worker, which looks at a share of the images
    at_first = own_mb()
    for number, batch in zip(range(1000), order):
        [(images.train.names[index], int(images.train.labels[index])) for _, index in batch]
    os.write(write, json.dumps(own_mb() - at_first).encode())
    os._exit(0)
os.wait()
worker = json.loads(os.read(read, 100))
print(json.dumps([opened - begun, ended - opened, mb, worker]))
"""


def rows(repeats: int) -> list[Row]:
    """Return the seconds of a first start and of later ones, and the memory of a process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make(folder / "images")
        time.sleep(2.5)  # a listing of folders that changed just now is not kept
        first = _start(folder)
        later = [_start(folder) for _ in range(max(2, repeats))]
    title = f"{IMAGES:,} files in {CLASSES} folders"
    print(
        f"{title}: first start {first[0]:.2f} s + {first[1]:.2f} s for the digests of a run; "
        f"later {later[0][0]:.2f} s + {later[0][1]:.2f} s; "
        f"{later[0][2]:.1f} MB a process, {later[0][3]:.1f} MB more in a worker"
    )
    gc.collect()
    return [
        Row(
            name=f"start with a kept listing, {title}",
            peer=f"{START_S:g} s",
            ours_s=[opened + digests for opened, digests, *_ in later],
            peer_s=[START_S] * len(later),
            kind="cost",
            limit=1.0,
        ),
        Row(
            name="MB more in a worker (as ms)",
            peer=f"{WORKER_MB:g} MB",
            ours_s=[worker / 1e3 for *_, worker in later],
            peer_s=[WORKER_MB / 1e3] * len(later),
            kind="cost",
            limit=1.0,
        ),
        Row(
            name="MB of a process for its images (as ms)",
            peer=f"{WORKER_MB:g} MB",
            ours_s=[mb / 1e3 for _, _, mb, _ in later],
            peer_s=[WORKER_MB / 1e3] * len(later),
            kind="cost",
        ),
    ]


def _make(folder: Path) -> None:
    """Make empty files with names as ImageNet's, and one validation image a class."""
    for number in range(CLASSES):
        name = f"n{number:08}"
        (folder / "val" / name).mkdir(parents=True)
        (folder / "val" / name / f"ILSVRC2012_val_{number:08}.JPEG").touch()
        path = folder / "train" / name
        path.mkdir(parents=True)
        for image in range(IMAGES // CLASSES + (number < IMAGES % CLASSES)):
            handle = os.open(path / f"{name}_{image}.JPEG", os.O_CREAT | os.O_WRONLY)
            os.close(handle)


def _start(folder: Path) -> tuple[float, float, float, float]:
    """Return seconds to open the images and to digest them, MB of them, and MB of a worker."""
    import json

    env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-c", _OPEN, str(folder / "images")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    opened, digests, mb, worker = json.loads(done.stdout.splitlines()[-1])
    return opened, digests, mb, worker

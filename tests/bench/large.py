"""Plans of ViT-L from 64 images, end to end: the time and the memory of a process for each method.

The weights are random, and so are the images: neither changes what is computed. A process scores,
plans, cuts and compensates to 60 % of the MACs by `vitrim.compress`, with its default recipe.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from .timing import Row

METHODS = ("oneshot", "mixed_rank")
MINUTES, GB = 6.0, 8.0
"""Bars, on two cores."""
_COMPRESS = """
import json, resource, sys, time
begun = time.perf_counter()
import timm, torch, vitrim
torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
net = timm.create_model("vit_large_patch16_224").eval()
images = torch.randn(64, 3, 224, 224)
found = vitrim.compress(net, images, sys.argv[1], macs=0.6, progress=False)
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([time.perf_counter() - begun, kilobytes / 1e6, found.report["kept"]["macs"]]))
"""


def rows(repeats: int) -> list[Row]:
    """Return seconds and gigabytes of one process for each method, next to the bars."""
    found = []
    for method in METHODS:
        seconds, gigabytes, kept = _compress(method)
        title = f"{method}: ViT-L from 64 images"
        print(f"{title}: {seconds:.0f} s, {gigabytes:.2f} GB, {kept:.1%} of the MACs", flush=True)
        for name, ours, bar in (
            (f"{title}, end to end", seconds, 60 * MINUTES),
            (f"{title}, peak GB (as ms)", gigabytes / 1e3, GB / 1e3),
        ):
            peer = f"{bar:g} s" if bar > 1 else f"{GB:g} GB"
            found.append(
                Row(name=name, peer=peer, ours_s=[ours], peer_s=[bar], kind="cost", limit=1.0)
            )
    return found


def _compress(method: str) -> tuple[float, float, float]:
    """Return seconds, the peak of the memory in GB, and the share of the MACs that is kept."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", _COMPRESS, method, threads]
    env = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{method}: ended with {done.returncode} {done.stderr}")
    seconds, gigabytes, kept = json.loads(done.stdout.splitlines()[-1])
    return seconds, gigabytes, kept

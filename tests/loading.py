"""A saved network, loaded and run in a process of its own."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fresh import python

LOAD = """
import sys
import torch
import vitrim
from safetensors.torch import load_file, save_file
folder, inputs, outputs = sys.argv[1:]
torch.set_num_threads(1)
net, plan = vitrim.load(folder)
with torch.no_grad():
    save_file({"logits": net(load_file(inputs)["images"])}, outputs)
"""


def logits_elsewhere(folder: Path, images: Tensor, scratch: Path) -> Tensor:
    """Return what the network saved in `folder` makes of `images`; files go to `scratch`."""
    inputs, outputs = scratch / "images", scratch / "logits"
    save_file({"images": images}, inputs)
    done = python("-c", LOAD, str(folder), str(inputs), str(outputs), cwd=scratch)
    assert done.returncode == 0, done.stderr
    return load_file(outputs)["logits"]

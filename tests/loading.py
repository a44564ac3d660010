"""A script that loads a saved network in a process of its own."""

from __future__ import annotations

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

"""A compact DeiT-S as exported, in OpenVINO, against the dense one in eager PyTorch; one image."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import timm
import torch

from vitrim.deploy.export import export

from .timing import Row, Side, take_turns

NAME = "deit_small_patch16_224"
RUN = (
    "model=deit_small",
    "method=oneshot",
    "data=none",
    "target.macs=0.6",
    "method.criterion=magnitude",
    "method.compensation=none",
    "method.round_to=8",
    "latency.repeats=1",
    "tracking=none",
)
LIMITS = {"f32": 0.32, "bf16": 0.18}


def rows(repeats: int) -> list[Row]:
    """Return the comparison in float32 and, where the processor has it, in bf16."""
    dense, image = timm.create_model(NAME).eval(), torch.randn(1, 3, 224, 224)
    precisions = ["f32", *(["bf16"] if _has_bf16() else [])]
    with tempfile.TemporaryDirectory() as folder:
        run = _run(Path(folder))
        sides = {"dense": Side(work=lambda _: _some(dense, image))}
        for precision in precisions:
            path, _ = export(run, "openvino", out=Path(folder) / precision, precision=precision)
            request = _request(path, precision)
            sides[precision] = Side(work=lambda _, r=request: _some(r.infer, [image.numpy()]))
        seconds = take_turns(sides, 4 * repeats)
    return [
        Row(
            name=f"DeiT-S of 0.6 of the MACs, exported, OpenVINO in {precision}, batch 1",
            peer="dense, eager, float32",
            ours_s=seconds[precision],
            peer_s=seconds["dense"],
            kind="cost",
            limit=LIMITS[precision],
        )
        for precision in precisions
    ]


def _run(folder: Path) -> Path:
    """Let the command make the compact network, and return its folder."""
    command = [sys.executable, "-m", "vitrim", *RUN, f"out={folder}"]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*/*/report.json")).parent


def _request(path: Path, precision: str) -> openvino.InferRequest:
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(path, "CPU", settings).create_infer_request()


def _has_bf16() -> bool:
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@torch.inference_mode()
def _some(net: Callable[[Any], Any], image: Any) -> None:
    """Answer a few times: a single pass is as short as the scheduler's slices."""
    for _ in range(4):
        net(image)

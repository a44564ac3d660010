"""The engines that run a network, and peak memory.

eager and compile are PyTorch's, graph replays a CUDA graph of eager; onnxruntime and OpenVINO read
ONNX.

Memory is in 1e6 bytes. In PyTorch (eager, compile) it is the weights and buffers plus the rise of
the memory peak in one pass: of what torch allocates on a GPU, of what is resident on CPU, after
freed memory was returned to the system. onnxruntime and OpenVINO allocate for themselves: there it
is that rise from before the model is read until after the first pass. On CPU it is measured on
Linux only.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitrim.deploy.formats import open_onnx, write_onnx
from vitrim.errors import ConfigError
from vitrim.network.timing import PRECISIONS, forward_pass

ENGINES = ("eager", "compile", "graph", "onnxruntime", "openvino")
Call = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How both networks of a benchmark are run: one line of its table."""

    engine: str
    precision: str
    batch: int
    device: str

    def __post_init__(self) -> None:
        for name, value, known in (
            ("engine", self.engine, ENGINES),
            ("precision", self.precision, (*PRECISIONS,)),
        ):
            if value not in known:
                raise ConfigError(f"--{name} {value}: expected some of {','.join(known)}")
        if self.batch < 1:
            raise ConfigError(f"--batch {self.batch}: expected whole numbers from 1 on")
        if self.engine == "compile" and self.device == "cpu":
            compiler = os.environ.get("CXX", "g++")
            if shutil.which(compiler) is None:
                raise ConfigError(
                    f"--engine compile: there is no C++ compiler ({compiler}), which torch.compile "
                    "needs on CPU: install g++, or omit this engine"
                )
        if self.engine == "graph" and torch.device(self.device).type != "cuda":
            raise ConfigError("--engine graph: CUDA graphs run on --device cuda only")
        if self.engine in ("onnxruntime", "openvino"):
            if self.device != "cpu":
                raise ConfigError(f"--engine {self.engine}: runs on --device cpu only")
            _require(self.engine, "onnx", "onnxscript", self.engine)


def _require(engine: str, *packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--engine {engine}: {', '.join(missing)} is not installed: pip install "
            "'vitrim[export]'"
        )


def prepare(net: nn.Module, x: Tensor, setting: Setting, path: Path) -> tuple[Call, float | None]:
    """Return the forward pass to be timed, after a first pass, and the memory that it needs.

    The pass does not wait for a GPU (`vitrim.network.timing.CudaClock` does). `path` is where a
    file may be written.
    """
    if setting.engine in ("onnxruntime", "openvino"):
        write_onnx(net, (x.shape[1], x.shape[2], x.shape[3]), path)
        _session(path, x, setting)  # the first one loads libraries and starts threads
        return _peak(lambda: _session(path, x, setting), x.device)
    moved = copy.deepcopy(net).to(setting.device, PRECISIONS[setting.precision])
    images = x.to(setting.device, PRECISIONS[setting.precision])
    forward = torch.compile(moved) if setting.engine == "compile" else moved
    call = forward_pass(forward, images)
    call()
    _, rise = _peak(call, images.device)
    weights = sum(tensor.nbytes for tensor in (*moved.parameters(), *moved.buffers())) / 1e6
    if setting.engine == "graph":
        call = forward_pass(moved, images, graphs=True)
    return call, None if rise is None else weights + rise


def _session(path: Path, x: Tensor, setting: Setting) -> Call:
    """Return a forward pass of the network in an ONNX file, after a first pass."""
    if setting.engine == "onnxruntime":
        run = open_onnx(path)

        def call() -> object:
            return [run(x)]  # outputs by index, as those of OpenVINO
    else:
        import openvino

        threads, images = torch.get_num_threads(), x.numpy()
        hint = {"fp32": "f32", "bf16": "bf16"}[setting.precision]
        config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()

        def call() -> object:
            return request.infer([images])

    call()
    return call


def _peak(action: Callable[[], T], device: torch.device) -> tuple[T, float | None]:
    """Return what `action` returns, and the rise of the memory peak meanwhile in 1e6 bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return action(), (torch.cuda.max_memory_allocated() - before) / 1e6
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return action(), None
    gc.collect()
    with contextlib.suppress(AttributeError):  # not every libc has it
        ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _resident("VmRSS")
    result = action()
    return result, (_resident("VmHWM") - before) / 1e3


def _resident(name: str) -> int:
    """Return an entry of the memory status of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 // 1000

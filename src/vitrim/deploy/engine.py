"""How a network is run: by PyTorch, compiled, by onnxruntime or by OpenVINO; and its peak memory.

Memory is in 1e6 bytes. In PyTorch (eager, compile) it is the weights and buffers, and by how much
the peak of memory rises in one pass: on a GPU of what torch allocates, on CPU of what is resident,
freed memory given back to the system before. In onnxruntime and OpenVINO, whose memory is their
own, it is that rise from before the model is read until after the first pass. On CPU it is known on
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

from vitrim.deploy.formats import write_onnx
from vitrim.errors import ConfigError

ENGINES = ("eager", "compile", "onnxruntime", "openvino")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One line of the table: how both networks are run."""

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
                    "needs on CPU: install g++, or leave this engine out"
                )
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


def prepared(net: nn.Module, x: Tensor, setting: Setting, path: Path) -> tuple[Call, float | None]:
    """Return the pass to be timed, warm, and the memory it needs; `path` is free for a file."""
    if setting.engine in ("onnxruntime", "openvino"):
        write_onnx(net, (x.shape[1], x.shape[2], x.shape[3]), path)
        _session(path, x, setting)  # the first one brings libraries and threads along
        return _peak(lambda: _session(path, x, setting), x.device)
    twin = copy.deepcopy(net).to(setting.device, PRECISIONS[setting.precision])
    images = x.to(setting.device, PRECISIONS[setting.precision])
    forward = torch.compile(twin) if setting.engine == "compile" else twin

    def call() -> None:
        forward(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    call()
    _, rise = _peak(call, images.device)
    weights = sum(tensor.nbytes for tensor in (*twin.parameters(), *twin.buffers())) / 1e6
    return call, None if rise is None else weights + rise


def _session(path: Path, x: Tensor, setting: Setting) -> Call:
    """Return a pass of the network in an ONNX file, after the first one."""
    threads, images = torch.get_num_threads(), x.numpy()
    if setting.engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        named = {session.get_inputs()[0].name: images}

        def call() -> object:
            return session.run(None, named)
    else:
        import openvino

        hint = {"fp32": "f32", "bf16": "bf16"}[setting.precision]
        config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
        request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()

        def call() -> object:
            return request.infer([images])

    call()
    return call


def _peak(do: Callable[[], T], device: torch.device) -> tuple[T, float | None]:
    """Return what `do` returns, and by how many 1e6 bytes the peak of memory rose meanwhile."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return do(), (torch.cuda.max_memory_allocated() - before) / 1e6
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return do(), None
    gc.collect()
    with contextlib.suppress(AttributeError):  # not every libc has it
        ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _resident("VmRSS")
    result = do()
    return result, (_resident("VmHWM") - before) / 1e3


def _resident(name: str) -> int:
    """Return an entry of this process's memory status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 // 1000

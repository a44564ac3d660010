"""Static int8 for other engines: weights and activations, by nncf, from calibration images.

The scales of activations are constants, estimated on images; nncf also scales the inputs of matrix
products per channel before (SmoothQuant, arXiv 2211.10438). The network in float is written in the
same format, and both are evaluated and timed in the engine that reads it: onnxruntime or OpenVINO.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from vitrim.deploy.formats import max_error, open_onnx, quiet, shape_of, write_onnx
from vitrim.deploy.runfolder import INT8_EXPORT, Document
from vitrim.deploy.saved import SavedNetwork
from vitrim.network import structure
from vitrim.network.timing import interleaved_times
from vitrim.versions import versions

_REPEATS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """What a network is calibrated and evaluated on.

    Args:
        calibration: batches of images, (n, C, H, W), prepared as the network expects them.
        evaluate: returns top-1 and top-5 in percent, and the number of `images`.
        facts: about the images, for the record.
    """

    calibration: Iterable[Tensor]
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    facts: Document


class Side(TypedDict):
    """What was measured of one network: its files in 1e6 bytes, percent, and milliseconds."""

    mb: float
    top1: float
    top5: float
    latency_ms: float


class EngineNet(nn.Module):
    """A network that another engine runs: from images (B, C, H, W) to logits (B, classes)."""

    def __init__(self, call: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.call = call

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, on the device of the images."""
        return torch.as_tensor(self.call(images.float().cpu())).to(images.device)


def write_static_int8(saved: SavedNetwork, path: Path, images: Images) -> str:
    """Write the network in int8, model.onnx or model.xml, and what was measured; return a summary.

    The folder of `path` also gets the network in float for a while. One image at a time is timed.
    """
    plain = path.with_name(f"float{path.suffix}")
    source = path.with_name("between.onnx")
    write_onnx(saved.net, shape_of(saved), source)
    calibration = [image[None] for batch in images.calibration for image in batch]
    if path.suffix == ".onnx":
        source.rename(plain)
        _quantize_onnx(saved, plain, path, calibration)
    else:
        _quantize_openvino(saved, source, plain, path, calibration)
    calls = [open_engine(plain), open_engine(path)]
    sentence = max_error(saved, calls[1], limit=None)
    float_side, int8_side = _measured(saved, [plain, path], calls, images)
    for part in (*_files(plain), *path.parent.glob(f"{source.name}*")):
        part.unlink()
    content = {
        "format": 1,
        "float": float_side,
        "int8": int8_side,
        "calibration_images": len(calibration),
        "threads": torch.get_num_threads(),
        **images.facts,
        **versions(),
    }
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    path.with_name(INT8_EXPORT).write_text(text)
    return f"{sentence}; {_summary(float_side, int8_side)}"


def open_engine(path: Path) -> Callable[[Tensor], object]:
    """Return the forward pass of model.onnx in onnxruntime, or of model.xml in OpenVINO."""
    if path.suffix == ".onnx":
        return open_onnx(path)
    import openvino

    threads = torch.get_num_threads()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    net = openvino.Core().compile_model(path, "CPU", config)
    return lambda x: net([x.numpy()])[0]


def _quantize_onnx(saved: SavedNetwork, source: Path, target: Path, images: list[Tensor]) -> None:
    import onnx

    inputs = [{"images": image.numpy()} for image in images]
    onnx.save(quantized_graph(saved, onnx.load(source), inputs), target)


def _quantize_openvino(
    saved: SavedNetwork, source: Path, plain: Path, target: Path, images: list[Tensor]
) -> None:
    import openvino

    net = openvino.Core().read_model(source)
    openvino.save_model(net, plain, compress_to_fp16=False)
    int8 = quantized_graph(saved, net, [image.numpy() for image in images])
    openvino.save_model(int8, target, compress_to_fp16=False)


def quantized_graph(saved: SavedNetwork, net: Any, inputs: list[Any]) -> Any:
    """Return a model of onnx or OpenVINO with int8 weights and activations."""
    os.environ.setdefault("NNCF_CI", "1")  # without it nncf reports its use over the network
    with quiet(), redirect_stdout(StringIO()):
        import nncf

        attends = bool(structure(saved.net).attentions)
        return nncf.quantize(
            net,
            nncf.Dataset(inputs),
            subset_size=len(inputs),
            model_type=nncf.ModelType.TRANSFORMER if attends else None,
        )


def _measured(
    saved: SavedNetwork,
    paths: list[Path],
    calls: list[Callable[[Tensor], object]],
    images: Images,
) -> list[Side]:
    """Return what is measured of the networks in `paths`, their passes interleaved."""
    x = torch.randn((1, *shape_of(saved)), generator=torch.Generator().manual_seed(0))
    times = interleaved_times([lambda call=call: call(x) for call in calls], _REPEATS)  # type: ignore[misc]
    sides: list[Side] = []
    for path, call, milliseconds in zip(paths, calls, times, strict=True):
        accuracy = images.evaluate(EngineNet(call))
        sides.append(
            {
                "mb": sum(file.stat().st_size for file in _files(path)) / 1e6,
                "top1": accuracy["top1"],
                "top5": accuracy["top5"],
                "latency_ms": statistics.median(milliseconds),
            }
        )
    return sides


def _files(path: Path) -> Iterator[Path]:
    """Iterate over the files of a network: its graph and, in files of their own, its weights."""
    return (file for file in path.parent.iterdir() if file.name.split(".")[0] == path.stem)


def _summary(before: Side, after: Side) -> str:
    return (
        f"{before['mb']:.2f} -> {after['mb']:.2f} MB, "
        f"top-1 {before['top1']:.2f} -> {after['top1']:.2f} %, "
        f"{before['latency_ms']:.2f} -> {after['latency_ms']:.2f} ms an image"
    )

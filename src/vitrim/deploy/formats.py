"""Writers of exported networks; each reads back what it wrote and compares it with the network."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vitrim.deploy.card import model_card
from vitrim.deploy.runfolder import Source
from vitrim.errors import VitrimError
from vitrim.files import PLAN, WEIGHTS
from vitrim.network import settle
from vitrim.plan import dumps

LIMIT = 1e-5  # largest error of a logit in float32, relative to the largest logit
BATCHES = (1, 3)  # compared; the graph is traced with another one
_TRACED = 2
_ONE_FILE = 2**31 - 2**24  # bytes of weights; a protobuf ends at 2 GiB


class FormatError(VitrimError):
    """A network that a format cannot hold, or that came out computing something else."""


def check_images(source: Source) -> None:
    """Refuse images that the network does not take.

    Raises:
        FormatError: naming their size.
    """
    images = source.images
    try:
        with torch.no_grad():
            source.net(_pictures(_shape(source), 1))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise FormatError(
            f"the network takes no images of {images.channels} x {images.size[0]} x "
            f"{images.size[1]} ({error}): --image-size PIXELS sets their side"
        ) from None


def onnx(source: Source, path: Path) -> str:
    """Write model.onnx, inputs `images` and outputs `logits`, and return what was found of it.

    Beyond 2 GiB the weights are in a second file, model.onnx.data.
    """
    import onnxruntime

    write_onnx(source.net, _shape(source), path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return compared(source, lambda x: session.run(None, {"images": x.numpy()})[0])


def openvino(source: Source, path: Path, *, precision: str) -> str:
    """Write model.xml and model.bin and return what was found of them.

    Weights are stored in float32, for bf16 in 16 bits, for int8 in 8 with a scale for each row.
    What is computed in is chosen when the file is compiled, by INFERENCE_PRECISION_HINT.
    """
    import openvino

    core = openvino.Core()
    between = path.with_name("between.onnx")
    write_onnx(source.net, _shape(source), between)
    graph = core.read_model(between)
    if precision == "int8":
        graph = _in_int8(graph)
    openvino.save_model(graph, path, compress_to_fp16=precision == "bf16")
    hint = "bf16" if precision == "bf16" else "f32"
    net = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    for rest in path.parent.glob(f"{between.name}*"):
        rest.unlink()
    limit = LIMIT if precision == "f32" else None
    return compared(source, lambda x: net([x.numpy()])[0], limit=limit)


def _in_int8(graph: Any) -> Any:
    """Return an OpenVINO model with the weights of its matrix products in int8."""
    os.environ.setdefault("NNCF_CI", "1")  # or it reports its use over the network
    with _hushed(), redirect_stdout(StringIO()):
        import nncf

        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)


def torch_export(source: Source, path: Path) -> str:
    """Write model.pt2, which torch.export.load reads, and return what was found of it."""
    held = BytesIO()
    with _hushed():
        torch.export.save(_program(source.net, _shape(source)), held)
    path.write_bytes(held.getbuffer())
    with _hushed():
        net = torch.export.load(path).module()
    return compared(source, net)


def timm_folder(source: Source, folder: Path, *, card: bool) -> str:
    """Write config.json and model.safetensors, which timm loads, and return what was found.

    With `card` README.md and plan.json beside them: a folder for a hub of models.
    """
    tensors = {name: tensor.contiguous() for name, tensor in source.net.state_dict().items()}
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(_config(source)))
    if card:
        (folder / PLAN).write_text(dumps(source.plan))
        (folder / "README.md").write_text(model_card(source))
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return compared(source, net, limit=0.0)


def _config(source: Source) -> dict[str, Any]:
    """Return timm's description of the network: its entrypoint, its arguments, its images."""
    net, images, args = source.net, source.images, source.plan.model["args"]
    known: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    kept = ("crop_mode", "fixed_input_size", "first_conv", "classifier", "license")
    described = {key: known[key] for key in kept if known.get(key) is not None}
    if args.get("dynamic_img_size") or not args.get("strict_img_size", True):
        described["fixed_input_size"] = False
    plan = json.loads(dumps(source.plan))
    return {
        "architecture": "vitrim_compact",
        "num_classes": net.num_classes,
        "model_args": {"plan": plan},
        "pretrained_cfg": {
            **described,
            "num_classes": net.num_classes,
            "input_size": [images.channels, *images.size],
            "mean": list(images.mean),
            "std": list(images.std),
            "interpolation": images.interpolation,
            "crop_pct": images.crop_pct,
        },
    }


def write_onnx(net: nn.Module, shape: tuple[int, int, int], path: Path) -> None:
    """Write `net` as ONNX, for any number of images (C, H, W)."""
    large = sum(tensor.nbytes for tensor in net.state_dict().values()) > _ONE_FILE
    with _hushed(), redirect_stdout(StringIO()):
        made = torch.onnx.export(
            _program(net, shape),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
        assert made is not None
        made.save(path, external_data=large)


def _program(net: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
    """Return the graph of the network for any number of images of one size."""
    net = copy.deepcopy(net)
    settle(net, shape[1:])
    x = _pictures(shape, _TRACED)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), _hushed():
        return torch.export.export(net, (x,), dynamic_shapes=({0: batch},))


def _shape(source: Source) -> tuple[int, int, int]:
    return (source.images.channels, *source.images.size)


def _pictures(shape: tuple[int, int, int], batch: int) -> Tensor:
    """Return images (batch, C, H, W) of noise, the same every time."""
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(batch))


def compared(
    source: Source, answer: Callable[[Tensor], Any], *, limit: float | None = LIMIT
) -> str:
    """Return a sentence on how far `answer`, images to logits, is from the network.

    Args:
        source: the network.
        answer: the exported one.
        limit: of the largest error, relative to the largest logit; None only reports it.

    Raises:
        FormatError: it is further away.
    """
    with torch.no_grad():
        pairs = [
            (torch.as_tensor(answer(x)), source.net(x))
            for x in (_pictures(_shape(source), batch) for batch in BATCHES)
        ]
    error = float(torch.stack([(found - said).abs().max() for found, said in pairs]).max())
    scale = float(torch.stack([said.abs().max() for _, said in pairs]).max())
    within = error < float("inf") if limit is None else error <= limit * scale
    sentence = f"max abs error {error:.2e}, logits up to {scale:.3g}"
    if not within:
        allowed = "a number" if limit is None else f"at most {limit:g} of the latter"
        raise FormatError(f"{sentence}: expected {allowed}; nothing was written")
    return sentence


@contextmanager
def _hushed() -> Iterator[None]:
    """Hold back warnings of exporters, which are about their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

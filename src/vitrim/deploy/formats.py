"""Writers of exported networks; each reads its file back and compares it with the network."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vitrim.deploy.card import model_card
from vitrim.deploy.runfolder import Document
from vitrim.deploy.saved import SavedNetwork
from vitrim.deploy.transformers_folder import loaded, write_folder
from vitrim.errors import VitrimError
from vitrim.files import PLAN, WEIGHTS, write_manifest
from vitrim.network import fix_input_size
from vitrim.network.int8 import is_int8
from vitrim.plan import dumps
from vitrim.store import ARCHITECTURE

if TYPE_CHECKING:
    from openvino import Model

LIMIT = 1e-5  # largest error of a logit in float32, relative to the largest logit
DYNAMIC_LIMIT = 0.05
"""The same where activations are int8: an engine's last bit may move one to the next integer."""
BATCHES = (1, 3)  # batch sizes that are compared; the graph is traced with another one
_TRACED = 2
_ONE_FILE = 2**31 - 2**24  # bytes of weights; a protobuf has at most 2 GiB


class FormatError(VitrimError):
    """A network that a format cannot hold, or whose export computes something else."""


def check_images(saved: SavedNetwork) -> None:
    """Refuse images that the network does not take.

    Raises:
        FormatError: naming the size of the images.
    """
    images = saved.images
    try:
        with torch.no_grad():
            saved.net(_noise(shape_of(saved), 1))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise FormatError(
            f"the network takes no images of {images.channels} x {images.size[0]} x "
            f"{images.size[1]} ({error}): --image-size PIXELS sets their side"
        ) from None


def onnx(saved: SavedNetwork, path: Path) -> str:
    """Write model.onnx, inputs `images` and outputs `logits`, and return its largest error.

    Weights of more than 2 GiB are in a second file, model.onnx.data.
    """
    write_onnx(saved.net, shape_of(saved), path)
    return max_error(saved, open_onnx(path))


def open_onnx(path: Path) -> Callable[[Tensor], object]:
    """Return the forward pass of model.onnx in onnxruntime, on as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x.numpy()})[0]


def openvino(saved: SavedNetwork, path: Path, *, precision: str) -> str:
    """Write model.xml and model.bin and return their largest error.

    Weights are stored in float32; for bf16 in 16 bits; for int8 in 8 bits with a scale per row. The
    precision of the computation is chosen when the file is compiled (INFERENCE_PRECISION_HINT).
    """
    import openvino

    core = openvino.Core()
    intermediate = path.with_name("between.onnx")
    write_onnx(saved.net, shape_of(saved), intermediate)
    graph = core.read_model(intermediate)
    if precision == "int8":
        graph = _in_int8(graph)
    openvino.save_model(graph, path, compress_to_fp16=precision == "bf16")
    hint = "bf16" if precision == "bf16" else "f32"
    net = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    for part in path.parent.glob(f"{intermediate.name}*"):
        part.unlink()
    limit = LIMIT if precision == "f32" else None
    return max_error(saved, lambda x: net([x.numpy()])[0], limit=limit)


def _in_int8(graph: Model) -> Model:
    """Return an OpenVINO model with the weights of its matrix products in int8."""
    os.environ.setdefault("NNCF_CI", "1")  # without it nncf reports its use over the network
    with quiet(), redirect_stdout(StringIO()):
        import nncf

        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)


def torch_export(saved: SavedNetwork, path: Path) -> str:
    """Write model.pt2, which torch.export.load reads, and return its largest error."""
    buffer = BytesIO()
    with quiet():
        torch.export.save(_program(saved.net, shape_of(saved)), buffer)
    path.write_bytes(buffer.getbuffer())
    with quiet():
        net = torch.export.load(path).module()
    return max_error(saved, net)


def timm_folder(saved: SavedNetwork, folder: Path, *, card: bool) -> str:
    """Write config.json and model.safetensors, which timm loads, and return the largest error.

    `card` adds README.md, plan.json and manifest.json: a folder for a model hub, which vitrim.load
    reads as well.
    """
    tensors = {name: tensor.contiguous() for name, tensor in saved.net.state_dict().items()}
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(_config(saved)))
    if card:
        (folder / PLAN).write_text(dumps(saved.plan))
        (folder / "README.md").write_text(model_card(saved))
        n_params = sum(parameter.numel() for parameter in saved.net.parameters())
        write_manifest(folder, (PLAN, WEIGHTS), params=n_params)
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return max_error(saved, net, limit=0.0)


def transformers_folder(saved: SavedNetwork, folder: Path) -> str:
    """Write what transformers loads without further code, and return the largest error."""
    write_folder(saved, folder)
    with quiet():
        net = loaded(folder)
        return max_error(saved, lambda x: net(pixel_values=x).logits)


def _config(saved: SavedNetwork) -> Document:
    """Return timm's description of the network: its entrypoint, arguments and images."""
    net, images, args = saved.net, saved.images, saved.plan.model["args"]
    known = saved.timm_config
    copied = ("crop_mode", "fixed_input_size", "first_conv", "classifier", "license")
    described = {key: known[key] for key in copied if known.get(key) is not None}
    if args.get("dynamic_img_size") or not args.get("strict_img_size", True):
        described["fixed_input_size"] = False
    plan = json.loads(dumps(saved.plan))
    return {
        "architecture": ARCHITECTURE,
        "num_classes": net.num_classes,
        **({"label_names": saved.classes} if saved.classes else {}),
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
    with quiet(), redirect_stdout(StringIO()):
        program = torch.onnx.export(
            _program(net, shape),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            optimize=not is_int8(net),  # which would store int8 weights in float
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=large)


def _program(net: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
    """Return the graph of the network for any number of images of one size."""
    net = copy.deepcopy(net)
    fix_input_size(net, shape[1:])
    x = _noise(shape, _TRACED)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), quiet():
        return torch.export.export(net, (x,), dynamic_shapes=({0: batch},))


def shape_of(saved: SavedNetwork) -> tuple[int, int, int]:
    """Return channels, height and width of the images of a network."""
    return (saved.images.channels, *saved.images.size)


def _noise(shape: tuple[int, int, int], batch: int) -> Tensor:
    """Return images of noise, (batch, C, H, W), the same at every call."""
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(batch))


def max_error(
    saved: SavedNetwork, exported: Callable[[Tensor], object], *, limit: float | None = LIMIT
) -> str:
    """Return a sentence with the largest error of a logit of the exported network.

    Args:
        saved: the network.
        exported: computes logits from images.
        limit: of the largest error, relative to the largest logit; None only reports it.

    Raises:
        FormatError: the error is larger.
    """
    with torch.no_grad():
        pairs = [
            (torch.as_tensor(exported(x)), saved.net(x))
            for x in (_noise(shape_of(saved), batch) for batch in BATCHES)
        ]
    if limit == LIMIT and any(edit.dynamic for edit in saved.plan.int8s()):
        limit = DYNAMIC_LIMIT
    error = float(torch.stack([(logits - ours).abs().max() for logits, ours in pairs]).max())
    scale = float(torch.stack([ours.abs().max() for _, ours in pairs]).max())
    within = error < float("inf") if limit is None else error <= limit * scale
    sentence = f"max abs error {error:.2e}, logits up to {scale:.3g}"
    if not within:
        allowed = "a number" if limit is None else f"at most {limit:g} of the largest logit"
        raise FormatError(f"{sentence}: expected {allowed}; nothing was written")
    return sentence


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings of exporters, which concern their own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""Save and load compact networks: plan.json, model.safetensors, manifest.json; no pickle.

Loading builds the dense skeleton on the meta device, cuts it, and assigns the saved tensors. The
logits are bit-equal to those of the saved network; nothing is downloaded or unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vitrim.files import PLAN, WEIGHTS, StoreError, read_text, verify, write, write_manifest
from vitrim.network import non_persistent_buffers
from vitrim.network.proof import difference, input_shape
from vitrim.network.skeleton import skeleton
from vitrim.network.surgery import cut_
from vitrim.plan import MAX_BYTES, Plan, check_json, dumps, loads

ARCHITECTURE = "vitrim_compact"
"""The name by which timm builds a compact network (`vitrim.deploy.registration`)."""
_MAX_HEADER = 2**20  # bytes of a safetensors header; ViT-g has 60,000
_LENGTH = 8  # bytes that state the length of the header
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_LOGITS = 8  # that the manifest has
_MAX_REASON = 256  # characters of a message of safetensors
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ALIGNMENT = 64  # bytes; matrix kernels use other code for data that is not aligned


def save(folder: str | Path, net: nn.Module, plan: Plan) -> Path:
    """Write `net`, the result of `plan` on its dense network, into `folder` and return the folder.

    Each file is replaced atomically, the manifest last. What `load` would return is built first,
    and must have the same logits for a fixed image; the manifest has the first of them.

    Raises:
        StoreError: the tensors of `net` are not those that the plan leads to, or it computes
            something else from them: with another activation, epsilon or forward of its own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_json(plan.model, "plan.model")
    check_json(plan.provenance, "plan.provenance")
    text = dumps(plan)
    loads(text)  # a plan that cannot be read back must not be written
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    twin = skeleton(plan)
    _check_fit(twin, state, where="the network to save")
    logits = _proved(net, assign(twin, state, plan), plan)
    write(folder / PLAN, lambda path: path.write_text(text))
    write(folder / WEIGHTS, lambda path: safetensors.torch.save_file(state, path, {"format": "pt"}))
    params = sum(p.numel() for p in net.parameters())
    write_manifest(folder, (PLAN, WEIGHTS), params=params, logits=logits)
    return folder


def _proved(net: nn.Module, twin: nn.Module, plan: Plan) -> list[float]:
    """Return logits of `net` for a fixed image, which those of `twin` are compared with.

    Raises:
        StoreError: they differ.
    """
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    shape = input_shape(twin, plan.model["args"].get("img_size"))
    problem, logits = difference(net, twin.to(device), shape)
    if problem:
        raise StoreError(
            f"the network to save is not the one that vitrim.load would return: {problem}; "
            "torch.export.save(torch.export.export(net, (images,)), FILE) keeps any network"
        )
    return [float(logit) for logit in logits[:_LOGITS] if bool(logit.isfinite())]


def load(folder: str | Path) -> tuple[nn.Module, Plan]:
    """Return the network saved in `folder`, in eval mode on CPU, and its plan.

    Raises:
        StoreError: a file is missing or differs from its checksum, or the tensors do not fit.
        PlanError: the plan is malformed.
    """
    folder = Path(folder)
    verify(folder, (PLAN, WEIGHTS))
    text = read_text(folder / PLAN, MAX_BYTES)
    plan = loads(text)
    net = skeleton(plan)
    state = {name: _aligned(tensor) for name, tensor in read_tensors(folder / WEIGHTS).items()}
    _check_fit(net, state, where=str(folder / WEIGHTS))
    _describe(assign(net, state, plan), json.loads(text))
    return net.eval(), plan


def _describe(net: nn.Module, plan: dict[str, object]) -> None:
    """Note in `net` what builds it, which timm writes into the folders that it makes."""
    known: dict[str, object] = net.pretrained_cfg  # type: ignore[assignment]
    net.pretrained_cfg = net.default_cfg = {**known, "architecture": ARCHITECTURE}  # type: ignore[assignment]
    net._model_args = {"plan": plan}  # type: ignore[assignment]


def assign(net: nn.Module, state: Mapping[str, Tensor], plan: Plan) -> nn.Module:
    """Assign tensors to the skeleton of `plan`, fill the buffers that are not saved; return it."""
    net.load_state_dict(state, strict=True, assign=True)
    _fill(net, non_persistent_buffers(net))
    empty = [name for name, buffer in net.named_buffers() if buffer.is_meta]
    if empty:  # modules that cannot refill them (most, before timm 1.0.23): build a second network
        twin = cut_(timm.create_model(plan.model["name"], **plan.model["args"]), plan)
        twin.to(next(tensor.dtype for tensor in net.parameters() if tensor.is_floating_point()))
        _fill(net, {name: twin.get_buffer(name) for name in empty})
    return net


def _fill(net: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        net.get_submodule(owner).register_buffer(last, buffer, persistent=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        StoreError: the file is missing, damaged, a pickle or of another format, or its header is
            too large.
    """
    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    _check_header(path)
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:_MAX_REASON]
        raise StoreError(f"{path} is not a readable safetensors file: {reason}") from None


def _check_header(path: Path) -> None:
    """Check the first 8 bytes of a safetensors file, which are the length of its header.

    Any length may begin with the two bytes that pickles and zip archives begin with (640 with those
    of a pickle). Read as a length, the 8 bytes of such a file are far larger than any header.

    Raises:
        StoreError: the file is a pickle, or its header is too large.
    """
    with path.open("rb") as file:
        start = file.read(_LENGTH)
    length = int.from_bytes(start, "little")
    if length <= _MAX_HEADER:
        return
    if start.startswith(_PICKLES):
        raise StoreError(f"{path} is a pickle, which can run code: expected a .safetensors file")
    if length <= path.stat().st_size - _LENGTH:
        raise StoreError(f"{path}: its header is larger than {_MAX_HEADER:,} bytes")


def _aligned(tensor: Tensor) -> Tensor:
    """Return `tensor` aligned as the allocator does it: results may differ in the last bit."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _check_fit(net: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Raise StoreError unless `state` has exactly the names and shapes of `net`."""
    problems = mismatches(net, state)
    if problems:
        raise StoreError(f"{where} does not fit its plan: {'; '.join(problems[:3])}")


def mismatches(net: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return the reasons why `state` cannot be loaded into `net`, one sentence each."""
    expected = {name: _signature(tensor) for name, tensor in net.state_dict().items()}
    given = {name: _signature(tensor) for name, tensor in state.items()}
    return [
        *(f"{name} is missing" for name in expected if name not in given),
        *(f"{name} does not belong to this network" for name in given if name not in expected),
        *(
            f"{name} has shape {given[name]}, expected {signature}"
            for name, signature in expected.items()
            if name in given and given[name] != signature
        ),
    ]


def _signature(tensor: Tensor) -> str:
    """Return what must agree between two tensors: the shape, and for integers the dtype."""
    if tensor.dtype in _FLOATS:
        return str(tuple(tensor.shape))
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"

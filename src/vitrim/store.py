"""Save and load compact networks: plan.json, model.safetensors, manifest.json; no pickle.

Loading builds the dense skeleton on the meta device, cuts it there, and assigns the saved tensors:
logits are bit-equal to the saved network's, and nothing is downloaded or unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vitrim.files import PLAN, WEIGHTS, StoreError, read_text, seal, verify, write
from vitrim.network import computed
from vitrim.network.skeleton import skeleton
from vitrim.network.surgery import carve
from vitrim.plan import MAX_BYTES, Plan, check_json, dumps, loads

_MAX_HEADER = 2**20  # bytes of a safetensors header; that of ViT-g has 60,000
_MAX_REASON = 256  # characters of what safetensors says
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ALIGNMENT = 64  # bytes; matrix kernels take other paths for data that starts elsewhere


def save(folder: str | Path, net: nn.Module, plan: Plan) -> Path:
    """Write `net`, the result of `plan` on its dense network, into `folder` and return it.

    Each file replaces its predecessor in one step, the manifest last.

    Raises:
        StoreError: the plan does not lead to the tensors of `net`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_json(plan.model, "plan.model")
    check_json(plan.provenance, "plan.provenance")
    text = dumps(plan)
    loads(text)  # what could not be read back is not written
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    _check_fit(skeleton(plan), state, where="the network to save")
    write(folder / PLAN, lambda path: path.write_text(text))
    write(folder / WEIGHTS, lambda path: safetensors.torch.save_file(state, path, {"format": "pt"}))
    seal(folder, (PLAN, WEIGHTS), params=sum(p.numel() for p in net.parameters()))
    return folder


def load(folder: str | Path) -> tuple[nn.Module, Plan]:
    """Return the network saved in `folder`, in eval mode on CPU, and its plan.

    Raises:
        StoreError: a file is missing or differs from its checksum, or the tensors do not fit.
        PlanError: the plan is malformed.
    """
    folder = Path(folder)
    verify(folder, (PLAN, WEIGHTS))
    plan = loads(read_text(folder / PLAN, MAX_BYTES))
    net = skeleton(plan)
    state = {name: _aligned(tensor) for name, tensor in read_tensors(folder / WEIGHTS).items()}
    _check_fit(net, state, where=str(folder / WEIGHTS))
    return assign(net, state, plan).eval(), plan


def assign(net: nn.Module, state: Mapping[str, Tensor], plan: Plan) -> nn.Module:
    """Give the skeleton of `plan` its tensors and return it, the buffers that no file holds too."""
    net.load_state_dict(state, strict=True, assign=True)
    _fill(net, computed(net))
    empty = [name for name, buffer in net.named_buffers() if buffer.is_meta]
    if empty:  # modules that cannot be asked, as most before timm 1.0.23: built anew
        twin = carve(timm.create_model(plan.model["name"], **plan.model["args"]), plan)
        twin.to(next(net.parameters()).dtype)
        _fill(net, {name: twin.get_buffer(name) for name in empty})
    return net


def _fill(net: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        net.get_submodule(owner).register_buffer(last, buffer, persistent=False)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        StoreError: missing, a pickle or another kind, damaged, or with an absurd header.
    """
    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(8)
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise StoreError(f"{path} is a pickle, which can run code: expected a .safetensors file")
    if _MAX_HEADER < int.from_bytes(start, "little") < path.stat().st_size:
        raise StoreError(f"{path}: its header is larger than {_MAX_HEADER:,} bytes")
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:_MAX_REASON]
        raise StoreError(f"{path} is not a readable safetensors file: {reason}") from None


def _aligned(tensor: Tensor) -> Tensor:
    """Return `tensor` where the allocator would put it: on some CPUs the last bit hangs on that."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _check_fit(net: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Raise StoreError unless `state` has exactly the names and shapes of `net`."""
    problems = misfits(net, state)
    if problems:
        raise StoreError(f"{where} does not fit its plan: {'; '.join(problems[:3])}")


def misfits(net: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return what keeps `state` from loading into `net`, one sentence each."""
    expected = {name: _kind(tensor) for name, tensor in net.state_dict().items()}
    found = {name: _kind(tensor) for name, tensor in state.items()}
    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is not of this network" for name in found if name not in expected),
        *(
            f"{name} has shape {found[name]}, expected {kind}"
            for name, kind in expected.items()
            if name in found and found[name] != kind
        ),
    ]


def _kind(tensor: Tensor) -> str:
    """Return what must agree between two tensors: the shape, and the kind of numbers."""
    if tensor.dtype in _FLOATS:
        return str(tuple(tensor.shape))
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"

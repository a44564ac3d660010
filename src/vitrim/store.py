"""Save and load compact networks: plan.json, model.safetensors, manifest.json; no pickle.

Loading builds the dense skeleton on the meta device, cuts it there, and assigns the saved tensors:
logits are bit-equal to the saved network's, and nothing is downloaded or unpickled.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from vitrim.atomic import write
from vitrim.errors import VitrimError
from vitrim.model import computed
from vitrim.plan import MAX_BYTES, Plan, PlanError, check_json, dumps, loads
from vitrim.surgery import carve

FORMAT = 1
MANIFEST, PLAN, WEIGHTS = "manifest.json", "plan.json", "model.safetensors"
_MAX_MANIFEST = 2**20  # bytes
_MAX_FILES = 16
_MAX_HEADER = 2**20  # bytes of a safetensors header; that of ViT-g has 60,000
_MAX_VALUES, _MAX_TEXT, _MAX_NUMBER, _MAX_REPEATS = 1000, 256, 2**16, 1000  # for timm to build
_MAX_MODULES, _MAX_ELEMENTS = 5000, 2**33
_FACTS = {"params", "name", "epochs"}
_DIGITS = {"sha256": re.compile("[0-9a-f]{64}"), "xxh3_128": re.compile("[0-9a-f]{32}")}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ALIGNMENT = 64  # bytes; matrix kernels take other paths for data that starts elsewhere
_LOADING = inspect.signature(timm.create_model).parameters.keys() - {"kwargs"}
"""Arguments of timm's factory itself: where weights come from, which a plan must not say."""


class StoreError(VitrimError):
    """A file that is missing, damaged, of a foreign kind, or that does not fit its plan."""


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
    plan = loads(_text(folder / PLAN, MAX_BYTES))
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


def skeleton(plan: Plan) -> nn.Module:
    """Return the compact network of `plan` without weights, on the meta device."""
    return carve(dense_skeleton(plan.model), plan)


def dense_skeleton(model: Mapping[str, Any]) -> nn.Module:
    """Return the dense network of timm.create_model's `name` and `args`, without weights.

    Raises:
        PlanError: timm knows no such network, or `args` would load something, do not fit it, or
            make a network beyond all sense.
    """
    if set(model) != {"name", "args"} or not isinstance(model["args"], dict):
        raise PlanError(f"plan.model has the keys {sorted(model)}: expected name and args")
    name, args = model["name"], model["args"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise PlanError(f"plan.model.name={name!r}: timm {timm.__version__} has no such model")
    loading = sorted(args.keys() & _LOADING)
    if loading:
        raise PlanError(f"plan.model.args: {', '.join(loading)} may not stand there")
    _check_values(args)
    try:
        with on_meta(), _bounded():
            net: nn.Module = timm.create_model(name, pretrained=False, **args)
    except (
        TypeError,
        ValueError,
        AssertionError,
        AttributeError,
        ArithmeticError,
        LookupError,
        RuntimeError,
    ) as e:
        reason = str(e).partition("\n")[0][:_MAX_TEXT]
        raise PlanError(f"{name} with args={args}: timm cannot build it ({reason})") from None
    return net


def _check_values(args: Mapping[str, Any]) -> None:
    """Raise PlanError where an argument is larger than that of any network."""
    values = [
        (_MAX_REPEATS if "depth" in name or "layers" in name else _MAX_NUMBER, value)
        for name, value in args.items()
    ]
    for most, value in values:  # which grows
        match value:
            case dict():
                values += [(most, part) for pair in value.items() for part in pair]
            case list() | tuple():
                values += [(most, part) for part in value]
            case str() if len(value) <= _MAX_TEXT:
                pass
            case None | bool():
                pass
            case int() | float() if abs(value) <= most:
                pass
            case _:
                raise PlanError(
                    f"plan.model.args: {reprlib.repr(value)}: expected numbers up to {most:,}, "
                    f"words up to {_MAX_TEXT} characters, and lists of them"
                )
        if len(values) > _MAX_VALUES:
            raise PlanError(f"plan.model.args: expected at most {_MAX_VALUES} values")


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop the building of a network with more modules or numbers than any has."""
    modules = elements = 0

    def count(owner: nn.Module, name: str, part: object) -> None:
        nonlocal modules, elements
        modules += isinstance(part, nn.Module)
        elements += part.numel() if isinstance(part, Tensor) else 0
        if modules > _MAX_MODULES or elements > _MAX_ELEMENTS:
            raise ValueError(
                f"it has more than {_MAX_MODULES:,} modules or {_MAX_ELEMENTS:,} numbers"
            )

    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def on_meta() -> Iterator[None]:
    """Build networks of timm in this context without memory and without random numbers."""
    with torch.device("meta"), _WithoutInit():
        yield


class _WithoutInit(TorchFunctionMode):
    """Skip the random initialisation of tensors that have no memory: half of a skeleton's time.

    The drop path rates that timm 1.0.19 and 1.0.20 read out of a tensor have memory.
    """

    _FILLS = frozenset(
        ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_")
    )
    _FILLS |= {
        "copy_",
        "kaiming_uniform_",
    }  # the latter whole: its inside is out of this mode's sight

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        filled = args[0] if args else kwargs.get("tensor")
        if func.__name__ in self._FILLS and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **kwargs)


def seal(folder: Path, names: tuple[str, ...], **facts: Any) -> None:
    """Write the manifest of `folder`: two checksums of each named file, and `facts`.

    SHA-256 names the content for the record; XXH3-128, thirty times as fast, guards every load
    against damage (neither guards against somebody who can rewrite the manifest too).
    """
    files = {
        name: {"sha256": sha256(folder / name), "xxh3_128": _xxh3(folder / name)} for name in names
    }
    text = _signed({"format": FORMAT, "files": files, **facts})
    write(folder / MANIFEST, lambda path: path.write_text(text))


def verify(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Check the named files of `folder` against its manifest and return the manifest.

    Raises:
        StoreError: no manifest, or a file is missing or differs.
    """
    manifest = _manifest(folder)
    for name in names:
        entry = manifest["files"].get(name)
        if entry is None or not (folder / name).is_file():
            raise StoreError(f"{folder / name} is missing: not a complete folder of vitrim")
        if _xxh3(folder / name) != entry["xxh3_128"]:
            raise StoreError(
                f"{folder / name} differs from its checksum in {MANIFEST}: it is damaged or was "
                "edited; restore it or run again into another folder"
            )
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(f"{path} is missing: expected a folder that vitrim saved")
    text = _text(path, _MAX_MANIFEST)
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{path}: expected format {FORMAT}")
    manifest.pop("checksum", None)
    if text != _signed(manifest):
        raise StoreError(f"{path} is damaged or was edited: its own checksum differs")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise StoreError(f"{path}: files: expected the two checksums of each file, by name")
    unknown = sorted(manifest.keys() - {"format", "files"} - _FACTS)
    if unknown or len(files) > _MAX_FILES:
        raise StoreError(
            f"{path}: unknown keys {unknown[:3]} or more than {_MAX_FILES} files: not of vitrim"
        )
    return manifest


def _is_entry(entry: object) -> bool:
    """Whether `entry` holds two checksums in hex, and nothing else."""
    return (
        isinstance(entry, dict)
        and entry.keys() == _DIGITS.keys()
        and all(
            isinstance(entry[k], str) and form.fullmatch(entry[k]) for k, form in _DIGITS.items()
        )
    )


def _text(path: Path, limit: int) -> str:
    """Return what is in a file of up to `limit` bytes; what is no text there is replaced."""
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise StoreError(f"{path}: expected at most {limit:,} bytes")
    return content.decode(errors="replace")


def _signed(manifest: Mapping[str, Any]) -> str:
    """Return the text of a manifest with a checksum of the rest of it."""
    rest = json.dumps(manifest, sort_keys=True)
    signed = {**manifest, "checksum": xxhash.xxh3_128_hexdigest(rest.encode())}
    return json.dumps(signed, indent=1, sort_keys=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _xxh3(path: Path) -> str:
    if not path.stat().st_size:  # cannot be mapped
        return xxhash.xxh3_128_hexdigest(b"")
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return xxhash.xxh3_128_hexdigest(content)


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
        reason = str(error).partition("\n")[0][:_MAX_TEXT]
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

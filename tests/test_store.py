from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from timm.models import VisionTransformer
from torch import Tensor, nn

from loading import logits_elsewhere
from nets import MODEL, PLANS, TINY, images, outputs, plan_of, small_net
from vitrim import Plan, combine, cut, load, save
from vitrim.files import MANIFEST, PLAN, WEIGHTS, StoreError, write, write_manifest
from vitrim.network import UnsupportedArchitecture
from vitrim.network.proof import fixed_logits
from vitrim.plan import PlanError, dumps, loads

FILES = [PLAN, WEIGHTS, MANIFEST]
KEPT = plan_of(
    {
        "blocks.0.attn.input": (0, 3, 23),
        "blocks.0.attn.qk": (0, 1, 2, 9),
        "blocks.0.attn.v": (0, 8, 9, 10, 23),
        "blocks.1.attn.heads": (1,),
        "blocks.1.mlp.hidden": (0, 47),
    }
)


@cache
def net() -> nn.Module:
    return small_net(dtype=torch.float32)


def x() -> Tensor:
    return images(dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved network that loads."""
    path = save(tmp_path / "net", cut(net(), KEPT), KEPT)
    load(path)
    return path


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved network for property tests, which restore what they damage."""
    return save(tmp_path_factory.mktemp("intact"), cut(net(), KEPT), KEPT)


def refused(folder: Path) -> bool:
    """Return whether loading raises one of the two documented errors."""
    try:
        load(folder)
    except (StoreError, PlanError):
        return True
    return False


def refused_with(folder: Path, name: str, content: bytes) -> bool:
    path = folder / name
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        return refused(folder)
    finally:
        path.write_bytes(original)


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and its checksum, to test the checks after the checksum."""
    (folder / name).write_bytes(content)
    write_manifest(folder, (PLAN, WEIGHTS))


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - set(FILES)


@given(PLANS)
def test_what_is_saved_is_loaded_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, plan: Plan
) -> None:
    small = cut(net(), plan)
    folder = save(tmp_path_factory.mktemp("net"), small, plan)
    loaded, its_plan = load(folder)
    assert its_plan == plan
    assert not loaded.training
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert not any(tensor.data_ptr() % 64 for tensor in loaded.parameters())
    assert {name: str(m) for name, m in loaded.named_modules()} == {
        name: str(m) for name, m in small.named_modules()
    }
    assert torch.equal(outputs(loaded, x()), outputs(small, x()))


def test_a_fresh_process_computes_the_same_bits(folder: Path, tmp_path: Path) -> None:
    logits = logits_elsewhere(folder, x(), tmp_path)
    with torch.no_grad():
        assert torch.equal(logits, cut(net(), KEPT)(x()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_come_back_as_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    small = cut(small_net(dtype=dtype), KEPT)
    loaded, _ = load(save(tmp_path, small, KEPT))
    state = small.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert {tensor.dtype for tensor in loaded.parameters()} == {dtype}


def test_a_network_cut_twice_is_saved_with_the_composed_plan(tmp_path: Path) -> None:
    second = plan_of({"blocks.0.attn.heads": (1, 2), "blocks.0.attn.input": (0, 2)})
    twice = cut(cut(net(), KEPT), second)
    loaded, _ = load(save(tmp_path, twice, combine(net(), KEPT, second)))
    assert torch.equal(outputs(loaded, x()), outputs(twice, x()))


def test_a_loaded_network_can_be_trained(folder: Path) -> None:
    loaded, _ = load(folder)
    loaded.train()(x()).square().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in loaded.parameters())


def test_saving_again_replaces_the_network(folder: Path) -> None:
    other = plan_of({"blocks.0.mlp.hidden": (5,)})
    save(folder, cut(net(), other), other)
    assert load(folder)[1] == other
    assert not leftovers(folder)


@pytest.mark.parametrize("name", FILES)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@example(position=0.0, bit=0)
def test_one_flipped_bit_is_noticed(intact: Path, name: str, position: float, bit: int) -> None:
    content = bytearray((intact / name).read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    assert refused_with(intact, name, bytes(content))


@pytest.mark.parametrize("digest", ["sha256", "xxh3_128"])
@pytest.mark.parametrize("name", [PLAN, WEIGHTS])
def test_a_flipped_bit_in_a_checksum_is_noticed(intact: Path, name: str, digest: str) -> None:
    text = (intact / MANIFEST).read_text()
    recorded = json.loads(text)["files"][name][digest]
    other = "0123456789abcdef"["1032547698badcfe".index(recorded[0])] + recorded[1:]
    assert refused_with(intact, MANIFEST, text.replace(recorded, other).encode())


@pytest.mark.parametrize("name", FILES)
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
@example(share=0.9999999)
def test_a_truncated_file_is_noticed(intact: Path, name: str, share: float) -> None:
    content = (intact / name).read_bytes()
    assert refused_with(intact, name, content[: int(share * len(content))])


@pytest.mark.parametrize("name", FILES)
def test_bytes_after_the_end_are_noticed(intact: Path, name: str) -> None:
    assert refused_with(intact, name, (intact / name).read_bytes() + b"\0")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        load(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        load(tmp_path / "nowhere")


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def zipped(payload: Payload) -> bytes:
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


def in_protocol(protocol: int) -> Callable[[Payload], bytes]:
    return lambda payload: pickle.dumps(payload, protocol)


@pytest.mark.parametrize("dump", [zipped, *map(in_protocol, range(6))])
def test_a_pickle_in_place_of_the_weights_is_refused_unrun(
    folder: Path, tmp_path: Path, dump: Callable[[Payload], bytes]
) -> None:
    trace = tmp_path / "trace"
    rewrite(folder, WEIGHTS, dump(Payload(trace)))
    with pytest.raises(StoreError, match=WEIGHTS):
        load(folder)
    assert not trace.exists()


@pytest.mark.parametrize("start", [b"PK", *(bytes([0x80, n]) for n in range(2, 6))])
def test_a_header_whose_length_begins_like_a_pickle_is_read(folder: Path, start: bytes) -> None:
    header_length = int.from_bytes(start, "little")
    tensors = {name: tensor.clone() for name, tensor in saved_tensors(folder).items()}
    content = safetensors.torch.save(tensors, {"format": "pt"})
    length = int.from_bytes(content[:8], "little")
    while length > header_length:
        header_length += 2**16
    header = content[8 : 8 + length].ljust(header_length)
    padded = header_length.to_bytes(8, "little") + header + content[8 + length :]
    assert padded.startswith(start)
    rewrite(folder, WEIGHTS, padded)
    state = load(folder)[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    rewrite(folder, WEIGHTS, padded[:500])
    with pytest.raises(StoreError, match="is not a readable safetensors file"):
        load(folder)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained"])
def test_a_plan_that_would_read_weights_from_elsewhere_is_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    trace, elsewhere = tmp_path / "trace", tmp_path / "elsewhere.pth"
    elsewhere.write_bytes(zipped(Payload(trace)))
    model = {**MODEL, "args": {**TINY, name: str(elsewhere)}}
    rewrite(folder, PLAN, dumps(Plan(model=model, edits=KEPT.edits)).encode())
    assert refused(folder)
    assert not trace.exists()


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / WEIGHTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "extra": torch.ones(1)},
        lambda state: {name: tensor for name, tensor in state.items() if name != "head.bias"},
        lambda state: {**state, "head.bias": torch.ones(8)},
        lambda state: {**state, "head.bias": torch.ones(1, 7)},
        lambda state: {**state, "head.bias": torch.ones(7, dtype=torch.int64)},
        lambda state: {**state, "head.bias": torch.ones(7, dtype=torch.bool)},
        lambda state: {},
    ],
    ids=["extra", "missing", "longer", "deeper", "integers", "booleans", "none"],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> None:
    rewrite(folder, WEIGHTS, safetensors.torch.save(change(saved_tensors(folder))))
    with pytest.raises(StoreError, match=WEIGHTS):
        load(folder)


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"blocks.0.mlp.hidden": (0, 1)},
        {"blocks.2.mlp.hidden": (0,)},
        {"blocks.0.mlp.hidden": (48,)},
        {"blocks.0.attn.heads": (0,), "blocks.0.attn.v": (9,)},
    ],
    ids=["no edits", "other widths", "no such site", "no such unit", "no head left"],
)
def test_a_plan_that_does_not_fit_the_weights_is_refused(
    folder: Path, kept: dict[str, tuple[int, ...]]
) -> None:
    rewrite(folder, PLAN, dumps(plan_of(kept)).encode())
    assert refused(folder)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"name": MODEL["name"]},
        {**MODEL, "more": 1},
        {**MODEL, "args": []},
        *({**MODEL, "name": name} for name in ("no_such_net", "hf-hub:a/b", "", 5, ["vit"], None)),
        *(
            {**MODEL, "args": {**TINY, **change}}
            for change in (
                {"no_such_argument": 1},
                {"embed_dim": 25},
                {"embed_dim": "24"},
                {"num_heads": 0},
                {"depth": -1},
                {"depth": 1},
                {"img_size": None},
            )
        ),
    ],
    ids=lambda model: str(model)[-60:],
)
def test_a_plan_of_a_network_that_cannot_be_built_or_is_another_is_refused(
    folder: Path, model: dict[str, Any]
) -> None:
    rewrite(folder, PLAN, dumps(Plan(model=model, edits=KEPT.edits)).encode())
    assert refused(folder)


def test_a_plan_of_a_network_that_cannot_be_cut_names_its_class(folder: Path) -> None:
    model = {"name": "tiny_vit_5m_224", "args": {}}
    rewrite(folder, PLAN, dumps(Plan(model=model, edits=())).encode())
    with pytest.raises(UnsupportedArchitecture, match="TinyVit"):
        load(folder)


@pytest.mark.parametrize(
    "index", ["[1, 0]", "[0, 0]", "[-1, 0]", "[0, 9999999999999]", "[true]", "[false, 1]", "[]"]
)
def test_a_plan_with_such_an_index_is_refused(folder: Path, index: str) -> None:
    text = dumps(plan_of({"blocks.0.mlp.hidden": (0,)}))
    tampered = text.replace("[\n    0\n   ]", index)
    assert tampered != text
    rewrite(folder, PLAN, tampered.encode())
    with pytest.raises(PlanError):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        dumps(KEPT).replace('"provenance": {}', '"provenance": {"a": NaN}').encode(),
        dumps(KEPT).replace('"format": 2', '"format": 3').encode(),
        dumps(KEPT).replace('"format": 2', '"format": 2, "more": 1').encode(),
        dumps(KEPT).replace('"provenance": {}', '"provenance": ' + "[" * 40 + "]" * 40).encode(),
    ],
    ids=lambda content: str(content[-20:]),
)
def test_a_file_that_is_no_plan_is_refused(folder: Path, content: bytes) -> None:
    rewrite(folder, PLAN, content)
    assert refused(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"format": 1}',
        b'{"format": 2, "files": {}}',
        b'{"format": 1, "files": []}',
        b'{"format": 1, "files": {"plan.json": null, "model.safetensors": 3}}',
        b'{"format": 1, "files": {"plan.json": {}, "model.safetensors": {}}}',
    ],
    ids=lambda content: str(content[:40]),
)
def test_a_file_that_is_no_manifest_is_refused(intact: Path, content: bytes) -> None:
    assert refused_with(intact, MANIFEST, content)


def half(path: Path) -> None:
    path.write_bytes(b"ha")
    raise OSError("disk full")


def interrupted(path: Path) -> None:
    path.write_bytes(b"ha")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fill", "error"), [(half, OSError), (interrupted, KeyboardInterrupt)], ids=["full", "ctrl-c"]
)
@pytest.mark.parametrize("old", [b"old", None], ids=["replacing", "new"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, fill: Callable[[Path], None], error: type[BaseException], old: bytes | None
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(error):
        write(path, fill)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])
    write(path, lambda target: target.write_bytes(b"new"))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"new"]


def test_an_interrupted_save_never_loads_as_a_mixture(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = plan_of({**{k.site: k.index for k in KEPT.keeps()}, "blocks.1.mlp.hidden": (1, 2)})
    before = (folder / WEIGHTS).read_bytes()
    monkeypatch.setattr("safetensors.torch.save_file", lambda state, path, *args: half(Path(path)))
    with pytest.raises(OSError, match="disk full"):
        save(folder, cut(net(), other), other)
    assert (folder / WEIGHTS).read_bytes() == before
    assert not leftovers(folder)
    assert refused(folder) or load(folder)[1] == KEPT


def test_a_network_of_another_plan_is_not_saved(tmp_path: Path) -> None:
    for small, plan in ((net(), KEPT), (cut(net(), KEPT), plan_of({}))):
        with pytest.raises(StoreError, match="does not fit its plan"):
            save(tmp_path / "net", small, plan)
    assert not (tmp_path / "net" / MANIFEST).exists()


@pytest.mark.parametrize(
    "provenance", [{"a": float("nan")}, {"a": {1}}, {1: 2}, {"a": Path()}], ids=str
)
def test_a_provenance_without_a_json_form_is_not_saved(
    tmp_path: Path, provenance: dict[Any, Any]
) -> None:
    plan = Plan(model=MODEL, edits=KEPT.edits, provenance=provenance)
    with pytest.raises(PlanError, match="provenance"):
        save(tmp_path, cut(net(), KEPT), plan)
    assert not (tmp_path / MANIFEST).exists()


def test_what_can_be_saved_can_be_loaded_however_deep_its_provenance(tmp_path: Path) -> None:
    small, provenance = cut(net(), KEPT), {}
    for depth in range(30):
        plan = Plan(model=MODEL, edits=KEPT.edits, provenance=provenance)
        try:
            save(tmp_path / str(depth), small, plan)
        except (StoreError, PlanError):
            assert depth > 5
            break
        assert load(tmp_path / str(depth))[1] == plan
        provenance = {"first": provenance}


def test_the_manifest_names_the_content_of_both_files(folder: Path) -> None:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert files.keys() == {PLAN, WEIGHTS}
    assert all(len(entry["sha256"]) == 64 for entry in files.values())
    assert loads((folder / PLAN).read_text()) == KEPT


class Doubled(VisionTransformer):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x)


def with_activation(net: nn.Module) -> None:
    net.blocks[1].mlp.act = nn.ReLU()


def with_epsilon(net: nn.Module) -> None:
    net.blocks[0].norm2.eps = 1e-5


def with_forward(net: nn.Module) -> None:
    net.__class__ = Doubled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_activation, r"differ by .*; blocks\.1\.mlp\.act is a ReLU, in timm's network GELU"),
        (with_epsilon, r"epsilon of blocks\.0\.norm2 is 1e-05, timm's network has 1e-06"),
        (with_forward, "differ by .*; the network is a Doubled, in timm's network VisionTr"),
    ],
)
def test_a_network_that_computes_something_else_is_not_saved(
    change: Callable[[nn.Module], None], message: str, tmp_path: Path
) -> None:
    net = small_net(dtype=torch.float32)
    change(net)
    with pytest.raises(StoreError, match=message):
        save(tmp_path, net, Plan(model=MODEL, edits=()))
    assert [*tmp_path.iterdir()] == []


def test_the_manifest_has_logits_and_may_lack_them(tmp_path: Path) -> None:
    net = small_net(dtype=torch.float32).train()
    save(tmp_path, net, Plan(model=MODEL, edits=()))
    assert net.training
    logits = json.loads((tmp_path / "manifest.json").read_text())["logits"]
    assert logits == fixed_logits(load(tmp_path)[0], (3, 32, 32)).tolist()
    write_manifest(tmp_path, ("plan.json", "model.safetensors"), params=1)
    load(tmp_path)

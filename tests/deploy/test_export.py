"""Exports: every format computes what the network computes, elsewhere too, or writes nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import yaml
from torch import nn
from torch.export import ExportedProgram

from command import Command, Done
from fresh import python
from nets import MODEL, SIZE, images, plan_of, randomise
from reports import document
from vitrim import Drop, LowRank, Plan, cut, save
from vitrim.cli.export import main
from vitrim.deploy import formats
from vitrim.deploy.export import FILES
from vitrim.deploy.saved import SavedNetwork
from vitrim.plan import Keep

TO_ANY = [to for to in FILES if to != "transformers"]
"""The formats that hold every network."""
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "args": {
        "img_size": 40,  # padded to full windows, half of them shifted
        "window_size": 4,
        "embed_dim": 12,
        "depths": [2],
        "num_heads": [2],
        "mlp_ratio": 2.0,
        "num_classes": 7,
    },
}
RESNET = {
    "name": "resnet18",
    "args": {
        "layers": [2, 1, 1, 1],
        "channels": [6, 8, 8, 8],
        "num_classes": 7,
        "in_chans": 1,
        "stem_type": "deep",
        "stem_width": 2,
    },
}
MOBILENET = {"name": "mobilenetv2_035", "args": {"depth_multiplier": 0.1, "num_classes": 7}}
DINOV2 = {
    "name": "dinov2_vits14_lc",
    "args": {"depth": 4, "embed_dim": 24, "num_heads": 3, "num_classes": 7},
}


def edited(model: dict[str, Any], kept: dict[str, Any], *edits: Any) -> Plan:
    return Plan(model=model, edits=(*plan_of(kept, model).edits, *edits))


KINDS: dict[str, tuple[Plan, int]] = {
    "vit": (
        edited(
            MODEL,
            {
                "blocks.0.attn.input": (0, 3, 5, 23),  # gathered
                "blocks.0.attn.qk": (0, 1, 9),  # the third head has none
                "blocks.0.attn.v": (1, 2, 3, 20),
                "blocks.0.mlp.hidden": (7,),
                "blocks.1.attn.heads": (0, 2),
                "blocks.1.attn.qk": (8,),  # of a head that goes: the others have none
            },
            LowRank(linear="blocks.0.attn.qkv.q", rank=2),
            LowRank(linear="blocks.0.mlp.fc1", rank=1),
            LowRank(linear="blocks.1.attn.proj", rank=3),
            Drop(branch="blocks.1.mlp"),
        ),
        SIZE,
    ),
    "swin": (
        edited(
            SWIN,
            {
                "layers.0.blocks.0.attn.heads": (1,),
                "layers.0.blocks.0.attn.input": (0, 5, 11),
                "layers.0.blocks.1.attn.qk": (0, 1, 2),
                "layers.0.blocks.1.attn.v": (0, 6, 7),
            },
            Drop(branch="layers.0.blocks.0.mlp"),
            LowRank(linear="layers.0.blocks.1.mlp.fc1", rank=3),
        ),
        40,
    ),
    "resnet": (
        edited(RESNET, {"layer1.0.conv1.channels": (0, 5)}, Drop(branch="layer1.1")),
        SIZE,
    ),
    "mobilenet": (
        Plan(
            model=MOBILENET,
            edits=(Keep(site="blocks.1.0.conv_pw.channels", index=(1,)),),
        ),
        SIZE,
    ),
    "dinov2 lc": (
        edited(
            DINOV2,
            {"backbone.blocks.1.attn.qk": range(3, 20)},
            Drop(branch="backbone.blocks.0.attn"),
        ),
        42,  # positions are resampled
    ),
}


TO_GRAPH = ("onnx", "openvino", "torch")
READ = """
import sys
sys.modules["vitrim"] = None  # importing it fails
import onnxruntime, openvino, torch
from safetensors.torch import load_file
given, onnx, xml, pt2 = sys.argv[1:]
torch.set_num_threads(1)
expected = load_file(given)
session = onnxruntime.InferenceSession(onnx)
compiled = openvino.Core().compile_model(xml, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
module = torch.export.load(pt2).module()
for batch in (1, 2, 5):
    x, ours = expected["images"][:batch], expected["logits"][:batch]
    onnx_logits = session.run(["logits"], {"images": x.numpy()})[0]
    for logits in (onnx_logits, compiled([x.numpy()])[0], module(x)):
        assert (torch.as_tensor(logits) - ours).abs().max() <= 1e-5 * expected["logits"].abs().max()
print("read")
"""
BUILD = """
import sys
import timm, torch, vitrim
from safetensors.torch import load_file
folder, given = sys.argv[1:]
torch.set_num_threads(1)
expected = load_file(given)
with torch.no_grad():
    logits = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(expected["images"])
assert torch.equal(logits, expected["logits"])
print("built")
"""
PROGRAMS: dict[str, ExportedProgram] = {}
GRAPHS: dict[str, bytes] = {}


@cache
def made(kind: str) -> nn.Module:
    plan, _ = KINDS[kind]
    torch.manual_seed(0)
    return cut(randomise(timm.create_model(plan.model["name"], **plan.model["args"])), plan)


def saved(folder: Path, kind: str = "vit") -> Path:
    return save(folder / "run", made(kind), KINDS[kind][0])


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the graphs of each network: making them takes seconds."""
    trace, make = formats._program, formats.write_onnx

    def key_of(net: nn.Module, shape: tuple[int, int, int]) -> str:
        return f"{net} {shape} {sum(float(p.detach().double().sum()) for p in net.parameters())}"

    def program(net: nn.Module, shape: tuple[int, int, int]) -> ExportedProgram:
        key = key_of(net, shape)
        if key not in PROGRAMS:
            PROGRAMS[key] = trace(net, shape)
        return PROGRAMS[key]

    def write(net: nn.Module, shape: tuple[int, int, int], path: Path) -> None:
        key = key_of(net, shape)
        if key not in GRAPHS:
            make(net, shape, path)
            GRAPHS[key] = path.read_bytes()
        path.write_bytes(GRAPHS[key])

    monkeypatch.setattr(formats, "_program", program)
    monkeypatch.setattr(formats, "write_onnx", write)


@dataclass(frozen=True)
class Export:
    """Runs `vitrim-export`."""

    capture: pytest.CaptureFixture[str]

    def __call__(self, run: Path, to: str, *words: str) -> Done:
        code: object = 0
        self.capture.readouterr()
        try:
            main([str(run), "--format", to, *words])
        except SystemExit as stop:
            code = stop.code
        printed = self.capture.readouterr()
        return Done(code=int(str(code)), output=printed.out, message=printed.err)


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Export:
    return Export(capsys)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def script(text: str, *arguments: str | Path) -> str:
    """Return what a fresh process prints."""
    done = python("-c", text, *map(str, arguments))
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def sample(path: Path, net: nn.Module) -> Path:
    """Write images and what the network makes of them."""
    x = images(dtype=torch.float32, batch=5)
    with torch.no_grad():
        safetensors.torch.save_file({"images": x, "logits": net(x)}, path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("vit", "resnet")))
        for kind in KINDS
    ],
)
def test_every_kind_computes_the_same_in_every_format(
    tmp_path: Path, export: Export, kind: str
) -> None:
    run = saved(tmp_path, kind)
    for to in TO_ANY:
        done = export(run, to, "--image-size", str(KINDS[kind][1]))
        assert done.code == 0, done.message
        *_, error, last = done.output.splitlines()
        assert error.startswith(f"{to}: max abs error ")
        assert Path(last) == run / "export" / to / FILES[to]
    assert not [name for name in files(run) if name.rpartition("/")[2].startswith(".")]


def test_graphs_are_read_without_vitrim(tmp_path: Path, export: Export) -> None:
    run = saved(tmp_path)
    paths = [export(run, to).output.splitlines()[-1] for to in TO_GRAPH]
    assert script(READ, sample(tmp_path / "sample", made("vit")), *paths) == "read"


def test_timm_builds_the_folder_once_its_architecture_is_imported(
    tmp_path: Path, export: Export
) -> None:
    folder = export(saved(tmp_path), "timm").output.splitlines()[-1]
    assert script(BUILD, folder, sample(tmp_path / "sample", made("vit"))) == "built"


def test_timm_gives_a_folder_another_head_or_new_weights(tmp_path: Path, export: Export) -> None:
    folder = f"local-dir:{export(saved(tmp_path), 'timm').output.splitlines()[-1]}"
    net, x = made("vit"), images(dtype=torch.float32)
    other = timm.create_model(folder, pretrained=True, num_classes=3).eval()
    drawn = timm.create_model(folder).eval()
    with torch.no_grad():
        assert torch.equal(other.forward_features(x), net.forward_features(x))
        assert other(x).shape == (2, 3)
        assert not torch.equal(drawn(x), net(x))
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    assert {name: tensor.shape for name, tensor in drawn.state_dict().items()} == shapes


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_openvino_stores_smaller_weights(tmp_path: Path, export: Export, precision: str) -> None:
    run = saved(tmp_path)
    done = export(run, "openvino", "--precision", precision, "--out", str(tmp_path / precision))
    assert done.code == 0, done.message
    assert export(run, "openvino").code == 0
    small, full = tmp_path / precision / "model.bin", run / "export" / "openvino" / "model.bin"
    assert small.stat().st_size < full.stat().st_size
    assert {path.name for path in small.parent.iterdir()} == {"model.bin", "model.xml"}


@pytest.mark.parametrize("earlier", [True, False])
def test_a_failure_leaves_what_was_there(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    run = saved(tmp_path)
    for to in TO_ANY if earlier else ():
        folder = run / "export" / to
        folder.mkdir(parents=True)
        (folder / (FILES[to] or "config.json")).write_text("earlier")
    before, folders = files(tmp_path), {path for path in tmp_path.rglob("*") if path.is_dir()}

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(formats, "max_error", full)  # when everything is written
    for to in TO_ANY:
        done = export(run, to)
        assert done.code == 1
        assert "No space left" in done.message
        assert files(tmp_path) == before, to
        assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders, to


def test_what_an_exporter_cannot_do_is_said(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path)

    def failing(*args: Any) -> ExportedProgram:
        raise RuntimeError("Constraints violated\nand so on")

    monkeypatch.setattr(formats, "_program", failing)
    done = export(run, "torch")
    assert done.code == 1
    assert done.message.count("\n") == 1
    assert "--format torch cannot write or read the network: Constraints violated" in done.message


def test_what_computes_something_else_is_not_written(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path)
    other = cut(made("vit"), Plan(model=MODEL, edits=()))
    with torch.no_grad():
        other.get_parameter("head.bias")[0] += 1e-3

    def wrong(run: SavedNetwork, exported: Any, **limits: Any) -> str:
        return max_error(replace(run, net=other), exported, **limits)

    max_error = formats.max_error
    monkeypatch.setattr(formats, "max_error", wrong)
    for to in TO_GRAPH:
        done = export(run, to)
        assert done.code == 1
        assert "max abs error 1.0" in done.message
        assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--format", "onnx", "--precision", "int8"], ["int8", "openvino"]),
        (["--format", "torch", "--image-size", "33"], ["3 x 33 x 33", "--image-size"]),
        (["--to", "torch", "--image-size", "0"], ["0", "--image-size"]),  # the former name
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: list[str]
) -> None:
    run = saved(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([str(run), *words])
    message = capsys.readouterr().err
    assert stop.value.code == 1
    assert message.count("\n") == 1
    assert all(word in message for word in expected), message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--format", "tflite"], ["tflite", "onnx", "openvino", "hf"]),
        (["--format", "onnx", "--precision", "fp8"], ["fp8", "bf16"]),
        (["--format", "onnx", "--image-size", "x"], ["x", "--image-size"]),
        ([], ["--format"]),
    ],
)
def test_a_bad_flag_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), *words])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in expected), message


def test_a_folder_that_no_run_left_is_refused(tmp_path: Path, export: Export) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        done = export(folder, "timm")
        assert done.code == 1
        assert str(folder) in done.message
    run = saved(tmp_path)
    (run / "recipe.yaml").write_text("model: [")
    done = export(run, "timm")
    assert done.code == 1
    assert "recipe.yaml" in done.message


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (["onnx"], "onnxscript"),
        (["openvino"], "openvino"),
        (["openvino", "--precision", "int8"], "nncf"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path,
    export: Export,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    package: str,
) -> None:
    there = find_spec
    monkeypatch.setattr(
        "vitrim.deploy.export.find_spec", lambda name: None if name == package else there(name)
    )
    done = export(tmp_path, *words)
    assert done.code == 1
    assert f"needs {package}: pip install 'vitrim[export]'" in done.message


def test_help_and_refusals_do_not_wait_for_torch() -> None:
    text = """
import sys
from vitrim.cli.export import main
for words in (["--help"], ["run", "--format", "onnx", "--precision", "bf16"]):
    try:
        main(words)
    except SystemExit:
        pass
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "RUN" in done.stdout


def front_matter(readme: str) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(readme.split("---")[1])
    return parsed


def test_the_card_of_a_run_says_what_it_cost_and_how_it_was_made(
    command: Command, export: Export
) -> None:
    criterion = ("method.criterion=magnitude", "method.compensation=none")
    run = command("method=oneshot", "data=none", "strength=3", *criterion).report.parent
    done = export(run, "hf")
    assert done.code == 0, done.message
    folder = Path(done.output.splitlines()[-1])
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "manifest.json", "model.safetensors", "plan.json")
    }
    readme, report = (
        (folder / "README.md").read_text(),
        json.loads((run / "report.json").read_text()),
    )
    known = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert front_matter(readme)["license"] == known.license
    assert front_matter(readme)["library_name"] == "timm"
    assert f"| {report['dense']['params']:,} | {report['compact']['params']:,} |" in readme
    assert "vitrim data=none method=oneshot model=vit_digits" in readme
    assert "method.criterion=magnitude" in readme
    assert f"torch {torch.__version__.partition('+')[0]}" in readme
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert config["input_size"] == [1, 8, 8]


def test_classes_are_named_where_the_report_names_all(tmp_path: Path, export: Export) -> None:
    run, names = saved(tmp_path), [*"abcdefg"]
    for classes, expected in ((names, names), (names[1:], None)):
        (run / "report.json").write_text(json.dumps({**document(), "classes": classes}))
        done = export(run, "hf")
        assert done.code == 0, done.message
        folder = Path(done.output.splitlines()[-1])
        net = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert net.pretrained_cfg.get("label_names") == expected
        listed = "Outputs: 7 logits (a, b, c, d, e, f, g)." in (folder / "README.md").read_text()
        assert listed == (expected is not None)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"model": {"pretrained": True}, "data": {}}, "apache-2.0"),
        ({"model": {"pretrained": False}, "data": {}}, "unknown"),  # trained by the run
    ],
)
def test_the_licence_is_that_of_weights_that_are_there(
    tmp_path: Path, export: Export, recipe: dict[str, Any], expected: str
) -> None:
    run = saved(tmp_path)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = Path(export(run, "hf").output.splitlines()[-1])
    readme = (folder / "README.md").read_text()
    assert front_matter(readme)["license"] == expected
    for line in ("`blocks.attn.qk`: 4 of 48 units", "of ranks 1 to 3", "dropped: `blocks.1.mlp`"):
        assert line in readme, readme

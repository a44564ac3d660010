"""Exports in static int8: calibrated and evaluated on images, next to the network in float."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from command import EVERY_IMAGE, QUICK, Command
from nets import MODEL, SIZE, images, relative_error, small_net
from vitrim import Plan, cut, save
from vitrim.cli.export import main
from vitrim.deploy import static_int8
from vitrim.deploy.export import export
from vitrim.deploy.saved import read_network
from vitrim.deploy.static_int8 import Images, open_engine
from vitrim.errors import VitrimError
from vitrim.network import structure
from vitrim.network.int8 import int8_edits

if find_spec("nncf") is None:
    pytest.skip("nncf is not installed", allow_module_level=True)

FILES = {
    "onnx": {"model.onnx", "int8.json"},
    "openvino": {"model.xml", "model.bin", "int8.json"},
}


@cache
def net() -> nn.Module:
    return small_net(dtype=torch.float32)


def batches() -> list[Tensor]:
    x = images(dtype=torch.float32, batch=12)
    return [x[:8], x[8:]]


def agreement(seen: list[nn.Module]) -> Any:
    """Return what evaluates a network by how often it agrees with the float one."""

    def evaluate(engine: nn.Module) -> Mapping[str, float]:
        seen.append(engine)
        x = images(SIZE, dtype=torch.float32, batch=64)
        with torch.no_grad():
            hits = engine(x).argmax(-1) == net()(x).argmax(-1)
        return {"top1": 100 * float(hits.float().mean()), "top5": 100.0, "images": 64}

    return evaluate


def exported(tmp_path: Path, format_name: str) -> tuple[Path, dict[str, Any]]:
    run = save(tmp_path / "run", net(), Plan(model=MODEL, edits=()))
    seen: list[nn.Module] = []
    chosen = Images(calibration=batches(), evaluate=agreement(seen), facts={"seed": 0})
    path, sentence = export(run, format_name, precision="int8_static", images=chosen)
    assert len(seen) == 2
    assert {file.name for file in path.parent.iterdir()} == FILES[format_name]
    measured = json.loads((path.parent / "int8.json").read_text())
    assert (measured["calibration_images"], measured["seed"]) == (12, 0)
    assert measured["float"]["top1"] == 100
    assert f"top-1 100.00 -> {measured['int8']['top1']:.2f} %" in sentence
    for side in (measured["float"], measured["int8"]):
        assert side["latency_ms"] > 0
    return path, measured


def test_both_networks_are_evaluated_and_timed_and_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[Any] = []

    def unchanged(saved: object, graph: object, items: list[Any]) -> object:
        inputs.extend(items)
        return graph

    monkeypatch.setattr(static_int8, "quantized_graph", unchanged)
    path, measured = exported(tmp_path, "openvino")
    assert measured["int8"]["mb"] == pytest.approx(measured["float"]["mb"], rel=0.1)
    assert len(inputs) == 12
    assert (torch.as_tensor(inputs[0]) == batches()[0][:1]).all()
    x = images(dtype=torch.float32)
    with torch.no_grad():
        expected = net()(x)
    assert relative_error(torch.as_tensor(open_engine(path)(x)), expected) < 1e-5


@pytest.mark.slow  # nncf takes half a minute
@pytest.mark.parametrize("format_name", FILES)
def test_int8_answers_nearly_as_float(tmp_path: Path, format_name: str) -> None:
    _, measured = exported(tmp_path, format_name)
    assert measured["int8"]["top1"] >= 60  # of 7 classes, random weights, 12 images
    assert measured["int8"]["mb"] < measured["float"]["mb"]


def test_a_run_is_calibrated_on_its_training_images(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_int8, "quantized_graph", lambda saved, graph, items: graph)
    done = command("strength=0", "method=oneshot", *QUICK, EVERY_IMAGE)
    run = done.report.parent
    words = [str(run), "--format", "onnx", "--precision", "int8_static"]
    main([*words, "--calibration-images", "20", "data=digits", "progress=false"])
    measured = json.loads((run / "export" / "onnx" / "int8.json").read_text())
    report = json.loads(done.report.read_text())
    assert measured["calibration_images"] == 20
    assert measured["choices"]["data"] == "digits"
    for side in ("float", "int8"):
        assert measured[side]["top1"] == pytest.approx(report["compact"]["top1"], abs=1e-3)
    for more, message in (
        ([], "add data=NAME"),
        (["data=none"], "data=none has no images"),
        (["data=digits", "--image-size", "8"], "images of the run's size"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*words, *more])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "torch", "--precision", "int8_static"], "only --format onnx or openvino"),
        (["--format", "onnx", "data=digits"], "only --precision int8_static looks at images"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_int8_networks_are_written_as_onnx_with_int8_weights(tmp_path: Path, dynamic: bool) -> None:
    run = save(tmp_path / "run", net(), Plan(model=MODEL, edits=()))
    (run / "recipe.yaml").write_text("model:\n  mean: [0.5, 0.5, 0.5]\n")
    plan = Plan(model=MODEL, edits=int8_edits(net(), structure(net()), dynamic=dynamic))
    int8 = cut(net(), plan)
    folder = save(run / "int8", int8, plan)
    assert read_network(folder).images.mean == [0.5, 0.5, 0.5]
    path, _ = export(folder, "onnx")
    tensors = {tensor.data_type: tensor for tensor in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.INT8 in tensors
    x = images(dtype=torch.float32)
    with torch.no_grad():
        expected = int8(x)
    error = relative_error(torch.as_tensor(open_engine(path)(x)), expected)
    assert error < (0.05 if dynamic else 1e-5)


def test_images_and_the_precision_go_together(tmp_path: Path) -> None:
    with pytest.raises(VitrimError, match="needs images"):
        export(tmp_path, "onnx", precision="int8_static")

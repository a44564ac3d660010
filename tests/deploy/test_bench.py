from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vitrim
from nets import images, plan_of, relative_error, small_net
from vitrim.cli.bench import main
from vitrim.deploy import engine
from vitrim.deploy.bench import advice
from vitrim.deploy.engine import Setting, prepare
from vitrim.errors import ConfigError
from vitrim.network.timing import interleaved_times

KEPT = {"blocks.0.mlp.hidden": range(13), "blocks.1.attn.qk": [0, 1, 2, 8, 9, 10, 16, 17]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    plan = plan_of(KEPT)
    vitrim.save(tmp_path / "run", vitrim.cut(small_net(dtype=torch.float32), plan), plan)
    return tmp_path / "run"


def test_dense_and_compact_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch", "1,2", "--precision", "fp32,bf16", "--repeats", "3", "--threads", "1"]
    main([str(run), *options])
    result = json.loads((run / "bench.json").read_text())
    rows = [(row["engine"], row["precision"], row["batch"]) for row in result["rows"]]
    assert rows == [("eager", p, b) for p in ("fp32", "bf16") for b in (1, 2)]
    dense, compact = small_net(), vitrim.load(run)[0]
    macs = [vitrim.count(net, 32).macs for net in (compact, dense)]
    assert result["macs_ratio"] == macs[0] / macs[1] < 1
    for row in result["rows"]:
        for side in (row["dense"], row["compact"]):
            assert 0 < side["low_ms"] <= side["median_ms"] <= side["high_ms"]
            assert side["memory_mb"] is None or side["memory_mb"] > 0.01
        assert row["latency_ratio"] > 0
    printed = capsys.readouterr().out
    assert printed.count("eager ") == 4
    assert printed.count("advice: ") == 3


def test_heads_run_in_the_fastest_arrangement(run: Path) -> None:
    main([str(run), "--repeats", "1", "--heads", "fastest"])
    (row,) = json.loads((run / "bench.json").read_text())["rows"]
    assert row["heads"] in ("runs", "fused", "padded")
    main([str(run), "--repeats", "1", "--heads", "padded"])
    (row,) = json.loads((run / "bench.json").read_text())["rows"]
    assert row["heads"] == "padded"


def test_advice_names_what_hurts(run: Path) -> None:
    assert advice(small_net()) == []
    odd, uneven, ragged = advice(vitrim.load(run)[0])
    assert odd.startswith("1 sites (blocks.1.attn.qk, ...) have head widths that are odd")
    assert "unequal width" in uneven
    assert ragged.startswith("1 sites (blocks.0.mlp.hidden, ...) have hidden widths that are no")


def test_calls_take_turns_after_an_untimed_round() -> None:
    seen: list[str] = []
    times = interleaved_times([lambda: seen.append("a"), lambda: seen.append("b")], 3)
    assert "".join(seen) == "abababab"
    assert [len(part) for part in times] == [3, 3]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_of_onnx_files_compute_what_the_network_does(tmp_path: Path, name: str) -> None:
    for package in ("onnx", "onnxscript", name):
        pytest.importorskip(package)
    net, x = small_net(dtype=torch.float32, depth=1), images(dtype=torch.float32)
    setting = Setting(engine=name, precision="fp32", batch=2, device="cpu")
    with torch.inference_mode():
        call, memory = prepare(net, x, setting, tmp_path / "net")
        expected = net(x)
    logits: Any = call()
    assert relative_error(torch.from_numpy(logits[0]), expected) < 1e-5
    assert memory is None or memory >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "compile"], "no C++ compiler (absent-c++), which torch.compile needs on CPU"),
        (["--engine", "onnxruntime"], "onnxruntime is not installed: pip install 'vitrim[export]'"),
        (["--engine", "openvino"], "openvino is not installed: pip install 'vitrim[export]'"),
    ],
)
def test_an_engine_that_cannot_run_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setenv("CXX", "absent-c++")
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main([str(run), *options])
    assert message in str(stop.value)
    assert not (run / "bench.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "tflite"], "--engine: tflite: expected some of eager,compile"),
        (["--precision", "fp8"], "--precision: fp8: expected some of fp32,bf16"),
        (["--batch", "0"], "--batch: 0: expected whole numbers from 1 on"),
        (["--batch", "1,x"], "--batch: 1,x: expected whole numbers from 1 on"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu' (choose from"),
        (["--threads", "0"], "--threads: 0: expected a whole number from 1 on"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_bad_flag_ends_with_2(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(run), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (run / "bench.json").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"engine": "tflite"}, "--engine tflite: expected some of eager,compile"),
        ({"precision": "fp8"}, "--precision fp8: expected some of fp32,bf16"),
        ({"engine": "graph"}, "--engine graph: CUDA graphs run on --device cuda only"),
        ({"batch": 0}, "--batch 0: expected whole numbers from 1 on"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(changed: dict[str, Any], message: str) -> None:
    values = {"engine": "eager", "precision": "fp32", "batch": 1, "device": "cpu", **changed}
    with pytest.raises(ConfigError, match=message):
        Setting(**values)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert "manifest.json is missing" in str(stop.value)

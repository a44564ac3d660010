"""The command, through its real entry point, and everything that must stop it before it starts."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

import vitrim
from command import EVERY_IMAGE, QUICK, Command
from fresh import Popen
from refusals import TINY, assert_refused
from vitrim.cli.app import main
from vitrim.cli.compose import CONF


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["method=nonsense"], ["method/nonsense", "vtp"]),
        (["methods=vtp"], ["methods", "strength", "method"]),
        (["method.nonsense=1"], ["method.nonsense", "levels"]),
        (["method.gate.epochs=1"], ["method.gate.epochs", "gating, fine_tuning"]),
        (
            ["experiment=vtp/cifar10_tiny", "data.augmentation.hflip=0"],
            ["auto_augment, color_jitter", "+data.augmentation.hflip=... hands it to timm"],
        ),
        (
            ["model=mobilenetv2", "model.args={pad_type: same}"],
            ["unknown key model.args.pad_type: +model.args.pad_type=... hands it to timm"],
        ),
        (["strength=-1"], ["strength=-1", "0 to 5"]),
        (["strength=5.1"], ["strength=5.1", "0 to 5"]),
        (["strength=x"], ["strength=x", "0 to 5"]),
        (["strength=null"], ["strength=null"]),
        (["strength=nan"], ["strength=nan", "0 to 5"]),
        (["target.macs=0"], ["target.macs=0", "above 0"]),
        (["target.macs=1.2"], ["target.macs=1.2", "at most 1"]),
        (["target.macs=x"], ["target.macs=x"]),
        (["target.macs=0.0001"], ["target.macs=0.0001", "cannot be reached"]),
        (["target.units=2"], ["target.units=2", "cannot be reached"]),
        (["target.macs=0.5", "target.params=0.5"], ["target.macs, target.params", "at most one"]),
        (["method.levels=[1,0.9,0.9,0.7,0.6,0.5]"], ["levels", "below the one before"]),
        (["method.scope=x"], ["method.scope=x", "global or site"]),
        (["model=timm", "model.name=tiny_vit_5m_224"], ["TinyVit", "VisionTransformer"]),
        (["model=timm", "model.name=vit_tiny_patch16_225"], ["vit_tiny_patch16_224"]),
        (["model.num_classes=7"], ["10 classes", "7", "model.num_classes"]),
        (["model=vit_tiny", "model.num_classes=10"], ["data=digits", "8x8", "224"]),
        (["model.image_size=9"], ["model.image_size=9", "8 and 10"]),
        (["data=imagefolder"], ["data.root"]),
        (["data=imagefolder", "data.root=/nonexistent"], ["data.root=/nonexistent"]),
        (["data=cifar10", "data.root=/nonexistent"], ["data.root=/nonexistent", "download"]),
        (["data.batch_size=0"], ["data.batch_size=0"]),
        (["data._target_=os.system"], ["os.system", "vitrim."]),
        (["data._target_=vitrim.cli.app.os.system"], ["vitrim.cli.app.os.system"]),
        (["model.checkpoint=/nonexistent.safetensors"], ["model.checkpoint=/nonexistent"]),
        (["model.pretrained=true", "model.checkpoint=x"], ["model.pretrained", "checkpoint"]),
        (["seed=-1"], ["seed=-1"]),
        (["tracking=nonsense"], ["tracking=nonsense", "offline"]),
    ],
)
def test_bad_input_ends_with_one_clear_message_and_no_run(
    command: Command, arguments: list[str], expected: list[str]
) -> None:
    assert_refused(command, *TINY, *arguments, expected=expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["method=oneshot", "method.sampling.images=0"], ["method.sampling.images=0", "from 1"]),
        (["method=oneshot", "target.units=1025"], ["target.units=1025", "1,024 units"]),
        (["method=oneshot", "method.criterion=nonsense"], ["method.criterion", "obs_greedy"]),
        (
            ["method=aiminify", "method.tables.default.removed=[0,1,3,2,4,5]"],
            ["levels", "below the one before"],
        ),
        (["method=oneshot", "model=vit_tiny", "model.num_classes=10"], ["8x8", "224"]),
    ],
)
def test_bad_input_of_one_shot_pruning_ends_likewise(
    command: Command, arguments: list[str], expected: list[str]
) -> None:
    assert_refused(command, *arguments, expected=expected)


def test_all_that_is_wrong_is_told_at_once(command: Command) -> None:
    done = command(*TINY, "strength=7", "data.batch_size=0", "model.image_size=9")
    message = done.message.partition("vitrim: ")[2]  # Hydra repeats the overrides before it
    for word in ("strength=7", "data.batch_size=0", "model.image_size=9"):
        assert word in message


def test_an_output_folder_that_cannot_be_written_is_named(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    done = command(*TINY, f"out={file}/below")
    assert done.code != 0
    assert "out" in done.message
    assert str(file) in done.message
    assert file.read_text() == "mine"


@pytest.mark.parametrize("kind", ["empty", "without val", "a class without images", "a file"])
def test_a_data_folder_without_images_is_named(command: Command, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "images"
    if kind == "a file":
        root.write_text("")
    else:
        root.mkdir()
    if kind == "without val":
        (root / "train" / "a").mkdir(parents=True)
    if kind == "a class without images":
        (root / "val" / "a").mkdir(parents=True)
    done = command(*TINY, "model=vit_tiny", "data=imagefolder", f"data.root={root}", "strength=0")
    assert done.code != 0
    assert str(root) in done.message


def test_checkpoints_that_cannot_be_trusted_are_refused(command: Command, tmp_path: Path) -> None:
    first = command(*TINY, "strength=0")
    run = first.report.parent
    net, _ = vitrim.load(run)
    pickle = tmp_path / "net.pth"
    torch.save(net, pickle)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"head.weight": torch.zeros(3, 3)}, other)
    damaged = tmp_path / "nan.safetensors"
    state = net.state_dict() | {"head.bias": torch.full((10,), float("nan"))}
    safetensors.torch.save_file(state, damaged)
    for path, word in ((pickle, "pickle"), (other, "does not fit"), (damaged, "not finite")):
        done = command(*TINY, "strength=0", f"model.checkpoint={path}")
        assert done.code != 0
        assert word in done.message
    weights = run / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-100] ^= 1
    weights.write_bytes(flipped)
    done = command(*TINY, "strength=1", f"model.checkpoint={run}")
    assert done.code != 0
    assert "checksum" in done.message


def test_a_pinned_checkpoint_must_be_the_one(command: Command) -> None:
    run = command(*TINY, "strength=0").report.parent
    done = command(*TINY, "strength=0", f"model.checkpoint={run}", "model.sha256=00")
    assert done.code != 0
    assert "SHA-256" in done.message


def test_one_run_from_command_line_to_a_network_that_loads(command: Command) -> None:
    done = command(*TINY, EVERY_IMAGE, "strength=3")
    assert done.code == 0
    lines = done.output.splitlines()
    assert lines[-1] == str(done.report)
    assert lines[0] == "vtp on vit_digits: 0.7 of the units (strength 3), seed 0"
    assert lines[1].startswith("epochs: dense 1, scoring 1, fine-tuning 1;")
    assert [line.split()[0] for line in lines[-5:-1]] == ["top-1", "dense", "after", "final"]
    report = json.loads(done.report.read_text())
    net, plan = vitrim.load(done.report.parent)
    assert plan.edits
    assert vitrim.count(net, 8)._asdict() == {
        name: report["compact"][name] for name in ("params", "macs", "flops")
    }
    assert report["kept"]["macs"] < 0.75
    assert 0 <= report["compact"]["top1"] <= report["compact"]["top5"] <= 100
    for name in ("latency_ms", "params"):
        assert report["compact"][name] > 0
    assert report["seed"] == 0
    assert report["evaluated_images"] == 360
    assert (report["weights"]["source"], len(report["weights"]["sha256"])) == ("trained", 64)
    assert (report["dataset"]["name"], report["dataset"]["classes"]) == ("digits", 10)
    assert "strength=3" in report["overrides"]
    assert not any(word.startswith("out=") for word in report["overrides"])
    assert report["latency"].keys() >= {"batch", "device", "precision", "threads"}
    assert report["recipe_hash"] in done.report.parent.name
    assert (done.report.parent / "metrics.jsonl").is_file()


def test_strengths_share_one_dense_and_one_gate_training(command: Command) -> None:
    reports = [command(*TINY, f"strength={strength}").report for strength in (1, 3)]
    phases = sorted(path.name.split("-")[0] for path in (command.out / "phases").iterdir())
    assert phases == ["dense", "score"]
    dense = [json.loads(path.read_text())["dense"]["top1"] for path in reports]
    assert dense[0] == dense[1]


def test_a_finished_run_is_found_again_and_not_repeated(command: Command) -> None:
    first = command(*TINY, "strength=1")
    before = first.report.stat().st_mtime_ns
    second = command(*TINY, "strength=1")
    assert second.report == first.report
    assert second.report.stat().st_mtime_ns == before


def test_the_same_command_elsewhere_gives_the_same_network(command: Command) -> None:
    runs = [
        command(*TINY, "strength=2", f"out={command.out}/{place}").report.parent
        for place in ("here", "there")
    ]
    assert runs[0].name == runs[1].name
    one, other = (vitrim.load(run)[0].state_dict() for run in runs)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_strength_zero_is_the_dense_network_bit_for_bit(command: Command) -> None:
    done = command(*TINY, "strength=0")
    net, plan = vitrim.load(done.report.parent)
    assert plan.edits == ()
    report = json.loads(done.report.read_text())
    for name in ("params", "macs", "flops", "top1", "top5"):
        assert report["dense"][name] == report["compact"][name]
    state = next((command.out / "phases").glob("dense-*/state.safetensors"))
    for name, tensor in safetensors.torch.load_file(state).items():
        assert torch.equal(tensor, net.state_dict()[name.removeprefix("net.")])


@pytest.mark.slow
def test_vit_base_is_counted_exactly_without_images(command: Command) -> None:
    done = command(*TINY, "model=vit_base", "data=none", "strength=0")
    report = json.loads(done.report.read_text())
    assert report["dense"]["params"] == 86_567_656
    assert report["dense"]["flops"] == 35_127_656_448
    assert report["dense"]["top1"] is None


def test_a_multirun_prints_every_report(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrim.jobs.sweep.subprocess", SimpleNamespace(Popen=Popen))
    done = command("-m", *TINY, "data=none", "strength=0,5")
    assert done.code == 0
    assert len(list(command.out.rglob("report.json"))) == 2


def test_help_does_not_wait_for_torch() -> None:
    probe = "import sys, vitrim.cli.app, vitrim.report.tables; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_folder_begun_with_another_recipe_is_refused_with_the_keys(command: Command) -> None:
    words = (*QUICK, "data=none", "strength=3")
    folder = command(*words).report.parent
    (folder / "report.json").unlink()
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("l1: 0.0001", "l1: 0.5"))
    done = command(*words)
    assert done.code == 1
    assert "method.l1 (0.5, now 0.0001)" in done.message
    recipe.write_text("[")
    assert "cannot be read" in command(*words).message
    recipe.unlink()
    assert command(*words).code == 0


def test_where_and_how_may_differ_when_a_run_goes_on(command: Command) -> None:
    words = (*QUICK, "data=none", "strength=3")
    folder = command(*words).report.parent
    (folder / "report.json").unlink()
    assert command(*words, "checkpoint.minutes=3", "latency.repeats=2").code == 0


def test_help_lists_every_choice_as_it_is_typed(command: Command) -> None:
    done = help_of(command)
    for path in (CONF / "experiment").rglob("*.yaml"):
        assert path.relative_to(CONF / "experiment").with_suffix("").as_posix() in done
    assert "base/" not in done


def help_of(command: Command) -> str:
    command.patch.setattr(sys, "argv", ["vitrim", "--help"])
    command.capture.readouterr()
    main()
    return command.capture.readouterr().out

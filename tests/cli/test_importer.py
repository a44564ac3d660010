"""`vitrim-import`: weights of other libraries as a folder that vitrim and timm read."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import timm
import torch

import vitrim
import weights
from command import QUICK, Command
from vitrim.cli.importer import main

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at its import


def run(*words: object) -> None:
    main([str(word) for word in words])


@pytest.mark.parametrize(
    "name", ["transformers ViT", "transformers Swin", "transformers DINOv2, registers"]
)
def test_a_folder_of_transformers_is_imported_with_its_network(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, logits, _ = weights.made(name)
    net.save_pretrained(tmp_path / "hub")  # type: ignore[operator]
    run(tmp_path / "hub", "--out", tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    ours, plan = vitrim.load(tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        expected = logits(weights.images())
        for found in (ours, again):
            assert float((found(weights.images()) - expected).abs().max()) < 1e-5
    assert plan.edits == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == [f"LABEL_{at}" for at in range(5)]


def test_the_printed_command_compresses_the_imported_network(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, _, _ = weights.made("transformers ViT")
    net.save_pretrained(tmp_path / "hub")  # type: ignore[operator]
    run(tmp_path / "hub", "--out", tmp_path / "out")
    first, *words = shlex.split(capsys.readouterr().out.splitlines()[0])
    assert first == "vitrim"
    done = command(*words, "data=none", *QUICK, "method=aiminify", "target.params=0.95")
    assert done.code == 0, done.message


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_network_of_timm_is_found_by_its_shapes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = timm.create_model(name, num_classes=3, img_size=32)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth")
    run(tmp_path / "net.pth", "--out", tmp_path / "out")
    _, plan = vitrim.load(tmp_path / "out")
    assert plan.model == {"name": name, "args": {"num_classes": 3, "img_size": 32}}


def test_arrays_need_the_name_of_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights.write_augreg(tmp_path / "net.npz")
    for words, message in (
        ((), "--model NAME"),
        (("--model", "nonesuch"), "no such model"),
        (("--model", "resnet18"), "timm reads no .npz file into a ResNet"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(tmp_path / "net.npz", *words, "--out", tmp_path / "out")
        assert ended.value.code == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_wrong_layout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "net.pth", "--format", "torchvision-vit", "--out", tmp_path / "out")
    assert ended.value.code == 1
    assert "not in the layout torchvision-vit: no class_token" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [(), ("--format", "nonesuch", "x"), ("x", "--out", ""), ("x", "--nonesuch")]
)
def test_a_bad_flag_ends_with_2(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


@pytest.mark.parametrize("name", ["nowhere.pth", "empty.pth", "hf-hub:a/b"])
def test_a_file_that_cannot_be_read_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.pth").touch()
    with pytest.raises(SystemExit) as ended:
        main([name])
    assert ended.value.code == 1
    assert name in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["empty.pth"]

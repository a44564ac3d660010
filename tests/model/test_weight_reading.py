"""Files of weights are read as data: damage and code are refused in one sentence."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from command import QUICK, Command
from nets import small_net
from sources import source
from vitrim.errors import ConfigError
from vitrim.files import StoreError, read_yaml
from vitrim.model.reading import described, read_weights


class Payload:
    """A pickle that leaves a trace when it is run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def as_list(payload: Payload, path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "hook": [payload]}, path)


def bare(payload: Payload, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload))


@pytest.mark.parametrize("write", [torch.save, as_list, bare])
@pytest.mark.parametrize("name", ["net.pth", "net.pth.tar", "last.ckpt", "pytorch_model.bin"])
def test_a_pickle_that_wants_to_run_code_is_refused_unrun(
    write: Callable[[Payload, Path], object], name: str, tmp_path: Path
) -> None:
    write(Payload(tmp_path / "canary"), tmp_path / name)
    with pytest.raises(ConfigError, match=r"a pickle (with [\w.]+, which is|that holds)"):
        source(checkpoint=str(tmp_path / name)).build()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(share: float, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(small_net(num_classes=5, dtype=torch.float32).state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ConfigError, match=r"net\.pth is damaged or not complete"):
        source(checkpoint=str(path)).build()


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "net.npz"])
def test_an_empty_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=rf"{name}.*(empty|damaged)"):
        source(checkpoint=str(tmp_path / name)).build()


def test_a_checkpoint_of_another_depth_is_refused(tmp_path: Path) -> None:
    torch.save(small_net(num_classes=5, depth=3).state_dict(), tmp_path / "net.pth")
    with pytest.raises(ConfigError, match=r"does not fit .*blocks\.2\.norm1\.weight does not"):
        source(checkpoint=str(tmp_path / "net.pth")).build()


@pytest.mark.parametrize("content", [3, "text", [torch.ones(1)], {}, {"epoch": 3}])
def test_a_file_without_named_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(StoreError, match="holds no tensors by name"):
        read_weights(tmp_path / "net.pth")


STATES = {
    "state_dict": {"a": torch.zeros(1), "b": torch.zeros(1)},
    "model_ema": {"state_dict": {"a": torch.ones(1), "b": torch.ones(1)}, "decay": 0.9},
    "teacher": {"n_averaged": torch.tensor(3), "a": torch.full((1,), 2.0)},
    "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    "args": argparse.Namespace(lr=0.1),
    "epoch": 7,
}


@pytest.mark.parametrize(
    ("weights", "first"), [(None, 0.0), ("model", 0.0), ("ema", 1.0), ("teacher", 2.0)]
)
def test_weights_are_chosen_by_name(weights: str | None, first: float, tmp_path: Path) -> None:
    torch.save(STATES, tmp_path / "net.pth")
    state = read_weights(tmp_path / "net.pth", weights)
    assert float(state["a"]) == first
    assert state.keys() <= {"a", "b"}


def test_weights_that_are_not_there_are_refused_with_those_that_are(tmp_path: Path) -> None:
    torch.save({key: STATES[key] for key in ("state_dict", "teacher")}, tmp_path / "net.pth")
    with pytest.raises(StoreError, match=r"no weights ema; it has model, teacher"):
        read_weights(tmp_path / "net.pth", "ema")
    with pytest.raises(ConfigError, match=r"model\.weights=ema: of a checkpoint"):
        source(weights="ema")


def test_parts_of_a_large_network_are_joined(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    assert read_weights(index).keys() == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    with pytest.raises(StoreError, match="names of files beside it"):
        read_weights(index)


def test_what_config_json_says(tmp_path: Path) -> None:
    config = {"id2label": {"1": "dog", "0": "cat"}, "image_size": 32, "model_type": "vit"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1]})
    )
    said = described(tmp_path)
    assert said.classes == ("cat", "dog")
    assert said.settings() == {
        "num_classes": 2, "image_size": 32, "mean": [0.5, 0.4, 0.3], "std": [1.0, 1.0, 1.0],
    }  # fmt: skip
    of_timm = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "label_names": ["a", "b", "c"],
        "pretrained_cfg": {"input_size": [3, 32, 48], "mean": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "config.json").write_text(json.dumps(of_timm))
    said = described(tmp_path)
    assert said.classes == ("a", "b", "c")
    assert said.settings() == {"num_classes": 3, "image_size": [32, 48], "mean": [0.1, 0.2, 0.3]}
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(StoreError, match="not valid JSON"):
        described(tmp_path)


def hub_folder(folder: Path) -> Path:
    """Write a folder of transformers with two classes."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48,
        image_size=32, patch_size=16, id2label={0: "cat", 1: "dog"}, layer_norm_eps=1e-6,
    )  # fmt: skip
    transformers.logging.disable_progress_bar()
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    processor = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.filterwarnings("ignore")  # of transformers, at its import
def test_a_folder_of_transformers_sets_classes_size_and_normalisation(
    command: Command, tmp_path: Path
) -> None:
    folder = hub_folder(tmp_path / "hub")
    args = ("depth=1", "embed_dim=24", "num_heads=3", "mlp_ratio=2")
    done = command(
        "model=timm", "model.name=vit_base_patch16_224", f"model.checkpoint={folder}",
        *(f"+model.args.{one}" for one in args), "data=none", *QUICK, "method=aiminify",
        "target.params=0.95",
    )  # fmt: skip
    assert done.code == 0, done.message
    assert "taken over from" in done.output
    recipe = read_yaml(done.report.parent / "recipe.yaml")
    assert recipe["model"]["num_classes"] == 2
    assert recipe["model"]["image_size"] == 32
    assert recipe["model"]["mean"] == [0.5, 0.4, 0.3]

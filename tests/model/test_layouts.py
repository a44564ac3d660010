"""Weights of other libraries: equal outputs, whatever the file, its names and its wrappers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weights
from nets import small_net
from sources import source
from vitrim.errors import ConfigError
from vitrim.model.huggingface import from_hf
from vitrim.model.layout import LAYOUTS, layout_of, nearest

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at its import
EXACT = 1e-5


@pytest.mark.parametrize("name", weights.CASES)
def test_a_network_of_another_library_computes_the_same(name: str, tmp_path: Path) -> None:
    assert weights.difference(name, ".safetensors", tmp_path) <= EXACT
    net, _, _ = weights.made(name)
    found = layout_of(weights.CASES[name].on_disk(net))
    assert found is not None
    assert found.name == weights.CASES[name].layout


@pytest.mark.parametrize("column", weights.FILES)
@pytest.mark.parametrize("name", ["transformers DINOv2, registers", "transformers DINOv3"])
def test_files_of_every_kind_hold_the_same_network(name: str, column: str, tmp_path: Path) -> None:
    assert weights.difference(name, column, tmp_path) <= EXACT


@pytest.mark.parametrize("name", [n for n in weights.CASES if n.startswith("transformers")])
def test_an_instance_of_transformers_becomes_the_equal_network(name: str) -> None:
    assert weights.difference_of_instance(name) <= EXACT


def test_arrays_of_augreg_are_loaded_by_timm(tmp_path: Path) -> None:
    assert weights.difference_of_arrays(tmp_path) <= EXACT


def test_arrays_of_another_depth_are_refused(tmp_path: Path) -> None:
    _, _, description = weights.write_augreg(tmp_path / "net.npz")
    deeper = {**description, "args": {**description["args"], "depth": 3}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"net\.npz"):
        weights.model_of(deeper, tmp_path / "net.npz", None).build()


@pytest.mark.parametrize("prefix", ["net.", "model.", "backbone.", "module.net._orig_mod."])
def test_prefixes_of_modules_around_the_network_are_found(prefix: str, tmp_path: Path) -> None:
    net = small_net(num_classes=5, dtype=torch.float32)
    state = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    save_file({**state, "criterion.weight": torch.ones(3)}, tmp_path / "net.safetensors")
    built = source(checkpoint=str(tmp_path / "net.safetensors")).build()
    assert torch.equal(built.head.weight, net.head.weight)


def test_a_classifier_beside_the_backbone_is_kept(tmp_path: Path) -> None:
    net = small_net(num_classes=5, dtype=torch.float32)
    state = {
        name if name.startswith("head.") else f"backbone.{name}": tensor
        for name, tensor in net.state_dict().items()
    }
    save_file(state, tmp_path / "net.safetensors")
    built = source(checkpoint=str(tmp_path / "net.safetensors")).build()
    assert torch.equal(built.head.weight, net.head.weight)


def test_a_file_that_fits_nothing_is_refused_with_the_nearest_layouts(tmp_path: Path) -> None:
    state = {"encoder.stem.weight": torch.ones(3), "class_token": torch.ones(1, 1, 24)}
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(ConfigError, match=r"nearest are torchvision-vit \(lacks conv_proj\.weight"):
        source(checkpoint=str(tmp_path / "net.safetensors")).build()
    assert nearest(state).count("lacks") == 3


def test_names_of_layouts_differ() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) > 10


def test_a_class_without_an_equal_is_refused_with_those_that_have_one() -> None:
    import transformers

    small = dict(weights.SMALL)
    config = transformers.ViTMAEConfig(**small)
    with pytest.raises(ConfigError, match=r"ViTMAEModel: no class .*ViTForImageClassification"):
        from_hf(transformers.ViTMAEModel(config))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("ViT", {"hidden_act": "mish"}, r"hidden_act=mish: expected one of gelu"),
        ("ViT", {"head_dim": 5}, r"head_dim=5: timm's networks have"),
        ("Dinov2", {"layer_norm_eps": 1e-3}, r"layer_norm_eps=0\.001"),
    ],
)
def test_options_without_an_equal_are_refused(
    kind: str, options: dict[str, object], message: str
) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**weights.SMALL, **options})
    with pytest.raises(ConfigError, match=message):
        from_hf(getattr(transformers, f"{kind}Model")(config))

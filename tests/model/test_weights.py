"""What a report says of dense weights: where they came from, and a digest that tells them apart."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

import sources
from nets import small_net
from vitrim.files import sha256
from vitrim.model.weights import describe_weights, digest_of

source = partial(sources.source, num_classes=None, image_size=None)


def test_a_digest_depends_on_every_tensor() -> None:
    net = small_net(dtype=torch.float32)
    before = digest_of(net)
    assert before == digest_of(small_net(dtype=torch.float32))
    with torch.no_grad():
        net.cls_token[0, 0, 0] += 1
    assert digest_of(net) != before


def test_where_weights_come_from(tmp_path: Path) -> None:
    net = small_net(dtype=torch.float32)
    file = tmp_path / "net.safetensors"
    safetensors.torch.save_file(net.state_dict(), file)
    loaded = describe_weights(source(checkpoint=str(file)), net, downloaded=True)
    name = "vit_tiny_patch16_224"
    assert loaded == {"name": name, "source": "checkpoint", "tag": None, "sha256": sha256(file)}
    new_head = source(checkpoint=str(file), reset_head=True)
    assert describe_weights(new_head, net, downloaded=True)["source"] == "trained"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"])
def test_downloaded_weights_have_the_tag_of_their_release(name: str) -> None:
    net, model = small_net(dtype=torch.float32), source(name=name, pretrained=True)
    tag = name.partition(".")[2] or "augreg_in21k_ft_in1k"
    found = describe_weights(model, net, downloaded=True)
    assert found["name"] == f"vit_tiny_patch16_224.{tag}"
    assert (found["source"], found["sha256"]) == ("timm", digest_of(net))
    without = describe_weights(model, net, downloaded=False)
    assert (without["source"], without["tag"], without["sha256"]) == ("random", None, None)
    trained = describe_weights(source(), net, downloaded=True)
    assert (trained["name"], trained["source"]) == ("vit_tiny_patch16_224", "trained")

"""The description of networks: kinds of sites, and how families are found."""

from __future__ import annotations

import shutil
from pathlib import Path

import vitrim
from fresh import python
from nets import skeleton_net, small_net
from vitrim.network import structure
from vitrim.network.structure import of_kind

FAMILY = '''
"""A family for this test: two Linears with hidden units in between."""

from torch import Tensor, nn

from vitrim.network.dispatch import structure
from vitrim.network.structure import Layer, Part, Site, Structure, full


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@structure.register
def _(net: Toy) -> Structure:
    units = (Part(site="hidden", offset=0, size=net.first.out_features),)
    site = Site(name="hidden", kind="hidden", size=net.first.out_features)
    layers = (
        Layer(name="first", branch="", out=units, inp=full(3)),
        Layer(name="last", branch="", out=full(2), inp=units),
    )
    return Structure(sites={site.name: site}, layers=layers)
'''

SCRIPT = """
import sys, torch, vitrim
from vitrim.network import structure
assert vitrim.__file__.startswith(sys.argv[1]), vitrim.__file__
toy = sys.modules["vitrim.network.family.toy"].Toy()
edits = (vitrim.Keep(site="hidden", index=(0, 3, 7)),)
small = vitrim.cut(toy, vitrim.Plan(model={}, edits=edits))
print(small.first.out_features, small(torch.ones(1, 3)).shape[1])
try:
    structure(torch.nn.ReLU())
except ValueError as error:
    print("Toy" in str(error))
"""


def test_sites_have_kinds_whatever_their_names() -> None:
    described = structure(skeleton_net("mixer_s16_224", img_size=32, num_classes=3))
    hidden = [site.name for site in of_kind(described, "hidden")]
    assert hidden[:2] == ["blocks.0.mlp_tokens.hidden", "blocks.0.mlp_channels.hidden"]
    assert len(hidden) == 16


def test_sites_of_several_kinds_come_in_network_order() -> None:
    described = structure(small_net(qk_norm=True))
    chosen = of_kind(described, "hidden", "qk")
    assert [site.name for site in chosen if "blocks.0" in site.name] == [
        "blocks.0.attn.qk",
        "blocks.0.mlp.hidden",
    ]
    assert any(site.locked_reason for site in chosen)
    assert of_kind(described, "channels") == []


def test_every_site_has_the_kind_of_its_name() -> None:
    for name in ("vit_tiny_patch16_224", "swinv2_tiny_window8_256", "resnet10t", "convnext_atto"):
        for site in structure(skeleton_net(name)).sites.values():
            assert site.name.rpartition(".")[2] == site.kind


def test_a_family_module_is_found_without_another_edit(tmp_path: Path) -> None:
    package = tmp_path / "vitrim"
    shutil.copytree(Path(vitrim.__file__).parent, package)
    (package / "network" / "family" / "toy.py").write_text(FAMILY)
    done = python("-c", SCRIPT, str(tmp_path), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "2", "True"]

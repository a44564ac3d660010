"""A compact ViT with even widths is a folder of transformers; others are refused with the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from nets import MODEL, TINY, plan_of, small_net
from vitrim import Drop, Plan, cut, save
from vitrim.deploy.export import export
from vitrim.errors import VitrimError

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, at its import
EVEN = {
    f"blocks.{block}.{site}": kept
    for block in range(2)
    for site, kept in (
        ("mlp.hidden", (0, 3, 5, 7)),
        ("attn.heads", (0, 2)),
    )
}


def saved(folder: Path, keeps: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
    plan = plan_of(dict(keeps))
    plan = Plan(model={"name": MODEL["name"], "args": TINY}, edits=plan.edits)
    net = cut(small_net(dtype=torch.float32), plan)
    save(folder, net, plan)
    return net


def test_an_even_network_is_loaded_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    net = saved(tmp_path / "run", EVEN)
    path, error = export(tmp_path / "run", "transformers")
    assert error.startswith("max abs error")
    theirs = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=False)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        difference = (theirs(pixel_values=images).logits - net(images)).abs().max()
    assert float(difference) < 1e-5
    assert theirs.num_parameters() == sum(tensor.numel() for tensor in net.parameters())
    config = json.loads((path / "config.json").read_text())
    assert (config["num_attention_heads"], config["intermediate_size"]) == (2, 4)


def test_narrower_heads_are_loaded_too(tmp_path: Path) -> None:
    kept = tuple(dim + 8 * head for head in range(3) for dim in (0, 2, 3, 6))
    sites = [f"blocks.{block}.attn.{dims}" for block in range(2) for dims in ("qk", "v")]
    saved(tmp_path / "run", dict.fromkeys(sites, kept))
    path, _ = export(tmp_path / "run", "transformers")
    assert json.loads((path / "config.json").read_text())["head_dim"] == 4


@pytest.mark.parametrize("site", ["blocks.0.mlp.hidden", "blocks.1.attn.heads"])
def test_an_uneven_network_is_refused_with_the_way_out(site: str, tmp_path: Path) -> None:
    saved(tmp_path / "run", {site: EVEN[site]})
    with pytest.raises(VitrimError, match=r"different widths.*--format timm or --format hf"):
        export(tmp_path / "run", "transformers")
    assert not (tmp_path / "run" / "export" / "transformers").exists()


def test_a_network_without_a_branch_is_refused(tmp_path: Path) -> None:
    plan = Plan(model={"name": MODEL["name"], "args": TINY}, edits=(Drop(branch="blocks.0.mlp"),))
    save(tmp_path / "run", cut(small_net(dtype=torch.float32), plan), plan)
    with pytest.raises(VitrimError, match="--format timm"):
        export(tmp_path / "run", "transformers")

"""Networks of timm: skeletons are built once, and callers that modify one get a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from command import Command
from nets import MODEL, TINY, small_net
from sources import source
from vitrim import Plan, save
from vitrim.errors import ConfigError
from vitrim.model import conversion
from vitrim.network import skeleton

QUIET = ("tracking=none", "progress=false", "latency.repeats=1")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the name of every network that timm builds is appended."""
    names: list[str] = []
    create = timm.create_model

    def counted(name: str, *args: Any, **kwargs: Any) -> torch.nn.Module:
        names.append(name)
        return create(name, *args, **kwargs)

    monkeypatch.setattr(timm, "create_model", counted)
    monkeypatch.setattr(skeleton, "_shared", {})
    monkeypatch.setattr(conversion, "_known", {})
    return names


def test_a_skeleton_is_built_once(built: list[str]) -> None:
    model = source()
    assert (model.n_classes, model.spec().size) == (5, (32, 32))
    assert model.shared_skeleton() is model.shared_skeleton()
    assert source().spec() == model.spec()
    assert model.skeleton() is not model.skeleton()
    assert built == [MODEL["name"]]
    assert model.build().training is False
    assert built == 2 * [MODEL["name"]]


def test_a_checkpoint_is_loaded_into_a_copy(tmp_path: Path, built: list[str]) -> None:
    saved = small_net(num_classes=5, dtype=torch.float32)
    description = {"name": MODEL["name"], "args": TINY | {"num_classes": 5}}
    save(tmp_path, saved, Plan(model=description, edits=()))
    built.clear()
    model = source(checkpoint=str(tmp_path))
    nets = [model.build(), model.build()]
    assert built == 2 * [MODEL["name"]], "the skeleton, and what timm's conversion is learned from"
    for net in nets:
        assert torch.equal(net.head.weight, saved.head.weight)
    assert nets[0].head.weight is not nets[1].head.weight
    assert all(parameter.is_meta for parameter in model.shared_skeleton().parameters())


def test_a_changed_skeleton_changes_no_other(built: list[str]) -> None:
    model = source()
    mine = model.skeleton()
    mine.head = torch.nn.Identity()
    mine.train()
    shared = model.shared_skeleton()
    assert isinstance(shared.head, torch.nn.Linear)
    assert all(parameter.is_meta for parameter in mine.parameters())
    assert built == [MODEL["name"]]


def test_few_skeletons_are_kept(built: list[str]) -> None:
    models = [source(num_classes=number) for number in range(2, 9)]
    assert [model.n_classes for model in models] == [*range(2, 9)]
    assert len(skeleton._shared) == skeleton._MAX_SHARED
    assert models[0].n_classes == 2


def test_a_run_builds_few_networks(command: Command, built: list[str]) -> None:
    """The skeleton for all checks, the dense network, and the skeleton of the saved network."""
    done = command("model=vit_digits", "method=oneshot", "data=none", "target.params=0.8", *QUIET)
    assert done.code == 0, done.message
    assert len(built) == 3, built


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = source(pretrained=True)

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"could not download the weights of .*\(no network\)"):
        model.build()

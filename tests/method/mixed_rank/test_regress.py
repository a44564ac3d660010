"""Regression and residual of low-rank layers: what they may not break, and what they must mend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from nets import MODEL, images, outputs, plan_of, relative_error, small_net
from vitrim import LowRank, Plan, cut
from vitrim.method.mixed_rank.regress import Regress
from vitrim.method.mixed_rank.residual import Residual
from vitrim.network import stream
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.recipe import Recipe

ALL = Sampling(images=48, tokens=None, class_token_weight=1.0)
FULL = {"attn.qkv": 24, "attn.proj": 24, "mlp.fc1": 24, "mlp.fc2": 24}
HALF = {"attn.qkv": 12, "attn.proj": 12, "mlp.fc1": 12, "mlp.fc2": 12}
SPLIT = {"attn.qkv.q": 6, "attn.qkv.v": 12, "mlp.fc2": 12}


def low_rank(ranks: dict[str, int]) -> Plan:
    edits = [
        LowRank(linear=f"blocks.{block}.{name}", rank=rank)
        for block in (0, 1)
        for name, rank in ranks.items()
    ]
    return Plan(model=MODEL, edits=tuple(edits))


def pictures() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    low = torch.randn(48, 3, 8, 8, generator=generator, dtype=torch.float64)
    return nn.functional.interpolate(low, size=32, mode="bilinear")


def regressed(small: nn.Module, dense: nn.Module) -> nn.Module:
    phase = Regress(small, dense, sampling=ALL, ridge=1e-7)
    phase.on_train_start()
    for at in range(0, 48, 16):
        phase.training_step((pictures()[at : at + 16], None), at)
    phase.on_train_epoch_end()
    return small


def off(small: nn.Module, dense: nn.Module) -> float:
    with torch.no_grad():
        ours, theirs = (net.blocks(stream(net).embed(pictures())) for net in (small, dense))
    return float((ours - theirs).square().sum())


def test_with_full_ranks_nothing_changes() -> None:
    dense = small_net()
    small = regressed(cut(dense, low_rank(FULL)), dense)
    assert relative_error(outputs(small, images()), outputs(dense, images())) < 1e-5


@pytest.mark.parametrize("ranks", [HALF, SPLIT, {"mlp.fc1": 10}, {"attn.proj": 8}])
@pytest.mark.parametrize("args", [{}, {"init_values": 0.3}, {"proj_bias": False}])
def test_the_stream_comes_nearer(ranks: dict[str, int], args: dict[str, object]) -> None:
    dense = small_net(**args)
    before = cut(dense, low_rank(ranks))
    after = regressed(cut(dense, low_rank(ranks)), dense)
    assert off(after, dense) < off(before, dense)
    downs = [name for name, _ in after.named_parameters() if name.endswith("down.weight")]
    assert all(torch.equal(after.get_parameter(n), before.get_parameter(n)) for n in downs)


def test_only_the_ends_of_branches_are_solved() -> None:
    dense = small_net()
    sliced = plan_of({"blocks.0.mlp.hidden": range(30)})
    plan = Plan(model=MODEL, edits=(*sliced.edits, *low_rank({"mlp.fc1": 10}).edits))
    before, after = cut(dense, plan), regressed(cut(dense, plan), dense)
    changed = {
        name
        for name, parameter in after.named_parameters()
        if not torch.equal(parameter, before.get_parameter(name))
    }
    ends = {
        f"blocks.1.{end}.{kind}" for end in ("attn.proj", "mlp.fc2") for kind in ("weight", "bias")
    }
    assert ends <= changed
    assert all(".proj." in name or ".fc2." in name for name in changed)


def test_a_residual_begins_with_what_stands_there() -> None:
    dense = small_net()
    small = cut(dense, low_rank(HALF))
    before = outputs(small, images())
    recipe = Recipe(epochs=1, lr=1e-2, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)
    phase = Residual(small, dense, rank=3, sampling=ALL, recipe=recipe)
    assert phase.ranks == 8 * 3
    phase._merge()
    assert torch.equal(outputs(small, images()), before)


@pytest.mark.parametrize("ranks", [HALF, SPLIT])
def test_the_residual_lowers_the_layers_errors_and_is_merged(
    ranks: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = small_net()
    small = cut(dense, low_rank(ranks))
    recipe = Recipe(epochs=1, lr=1e-2, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)
    phase = Residual(small, dense, rank=3, sampling=ALL, recipe=recipe)
    monkeypatch.setattr(phase, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(phase, "_trainer", SimpleNamespace(estimated_stepping_batches=60))
    phase.on_train_start()
    optimiser = phase.configure_optimizers()["optimizer"]
    first = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    losses = []
    for _ in range(60):
        loss = phase.training_step((pictures(), None), 0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    last = phase.training_step((pictures(), None), 0).item()
    phase.on_fit_end()
    assert all(parameter.requires_grad for parameter in small.parameters())
    for name in phase._twins:
        layer = small.get_submodule(name)
        assert torch.equal(layer.up.weight[:, :-3], first[f"{name}.up.weight"][:, :-3])
        assert not torch.equal(layer.up.weight[:, -3:], first[f"{name}.up.weight"][:, -3:])
    merged = Residual(small, dense, rank=0, sampling=ALL, recipe=recipe)
    monkeypatch.setattr(merged, "log", lambda *args, **kwargs: None)
    assert merged.training_step((pictures(), None), 0).item() == pytest.approx(last)

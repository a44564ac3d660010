"""DINOv2-S with the hub's head: its names, its size, its cut."""

from pathlib import Path

import pytest
import timm
import torch

from loading import logits_elsewhere
from nets import plan_of, relative_error, skeleton_net
from vitrim import count, cut, load, masked
from vitrim.closed_form.reconstruction import reconstruct
from vitrim.network import stream, structure
from vitrim.network.family import dinov2_lc
from vitrim.store import save
from vitrim.trainer.calibrate import Calibrate, Sampling
from vitrim.trainer.refit import Refit

MODEL = {"name": "dinov2_vits14_lc", "args": {"depth": 4, "embed_dim": 24, "num_heads": 3}}
PLAN = plan_of(
    {
        "backbone.blocks.0.mlp.hidden": range(0, 96, 2),
        "backbone.blocks.1.attn.qk": range(3, 20),
        "backbone.blocks.2.attn.heads": [0, 2],
        "backbone.blocks.3.attn.input": range(10),
    },
    MODEL,
)

PLAN_OF_TWO = plan_of(
    {
        "backbone.blocks.0.mlp.hidden": range(0, 96, 2),
        "backbone.blocks.1.attn.qk": range(3, 20),
    },
    MODEL,
)


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(MODEL["name"], **MODEL["args"]).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def pictures(side: int = 42) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).double()


def test_params_and_true_flops_are_the_hubs() -> None:
    net = skeleton_net(MODEL["name"])
    assert count(net, 644) == (23_977_576, 86_734_608_384, 173_469_216_768)
    names = set(net.state_dict())
    assert {"linear_head.weight", "linear_head.bias"} < names
    assert all(name.startswith(("backbone.", "linear_head.")) for name in names)
    assert {f"backbone.{name}" for name in ("mask_token", "pos_embed", "cls_token")} < names
    assert net.state_dict()["backbone.pos_embed"].shape == (1, 1370, 384)
    assert net.state_dict()["linear_head.weight"].shape == (1000, 1920)


def test_the_head_reads_four_class_tokens_and_the_mean_patch() -> None:
    net, x = small(), pictures()
    with torch.no_grad():
        layers = net.backbone.get_intermediate_layers(x, n=4, return_prefix_tokens=True, norm=True)
        tokens = [prefix[:, 0] for _, prefix in layers]
        expected = net.linear_head(torch.cat([*tokens, layers[-1][0].mean(1)], dim=-1))
        assert torch.allclose(net(x), expected)


def test_a_cut_is_its_mask_and_is_loaded_to_the_bit(tmp_path: Path) -> None:
    net, x = small(), pictures()
    compact = cut(net, PLAN)
    with torch.no_grad():
        assert relative_error(compact(x), masked(net, PLAN)(x)) < 1e-12
        loaded, _ = load(save(tmp_path, compact, PLAN))
        assert torch.equal(loaded(x), compact(x))
        assert compact(pictures(56)).shape == (2, 1000)


def test_following_the_stream_is_running_the_backbone() -> None:
    net, x = small(), pictures()
    described = stream(net)
    with torch.no_grad():
        tokens = described.embed(x)
        for branch in described.branches:
            tokens = tokens + branch.apply(tokens)
        assert torch.allclose(net.backbone.norm(tokens), net.backbone.forward_features(x))
    assert net.get_submodule(described.final_norm) is net.backbone.norm


def test_it_is_calibrated_compensated_and_refitted() -> None:
    net, x = small(), torch.cat([pictures()] * 4)
    sites = ["backbone.blocks.0.mlp.hidden", "backbone.blocks.1.attn.qk"]
    sampling = Sampling(images=8, tokens=None, class_token_weight=1.0)
    phase = Calibrate(net, sites=sites, sampling=sampling, taylor=True)
    phase.on_train_start()
    phase.training_step((x, None), 0)
    phase.on_train_end()
    evidence, described = phase.evidence(), structure(net)
    compact = cut(net, PLAN_OF_TWO)
    values = reconstruct(
        net, compact, described, PLAN_OF_TWO, evidence.moments, kind="ridge", ridge=1e-6
    )
    assert "backbone.blocks.1.attn.qkv.weight" in values
    before = float((compact(x) - net(x)).detach().square().sum())
    with torch.no_grad():
        for name, value in values.items():
            compact.get_parameter(name).copy_(value)
    refit = Refit(compact, net, sampling=sampling, ridge=1e-6, closing_ridge=1.0)
    for epoch in range(2):
        refit.observe(x, epoch)
        refit.solve(epoch)
    assert float((compact(x) - net(x)).detach().square().sum()) < before


def test_the_hubs_files_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = timm.create_model(MODEL["name"], num_classes=1000)
    state = net.state_dict()
    for part, prefix in (("pretrain", "backbone."), ("linear4_head", "linear_head.")):
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        torch.save(tensors, tmp_path / f"dinov2_vits14_{part}.pth")
    monkeypatch.setattr(dinov2_lc, "HUB", tmp_path.as_uri())
    downloaded = timm.create_model(
        MODEL["name"], pretrained=True, cache_dir=str(tmp_path / "cache")
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in downloaded.state_dict().items())


def test_a_saved_network_is_found_by_name_in_a_fresh_process(tmp_path: Path) -> None:
    net = cut(small(), PLAN)
    save(tmp_path / "run", net, PLAN)
    logits = logits_elsewhere(tmp_path / "run", pictures(), tmp_path)
    with torch.no_grad():
        assert torch.equal(logits, net(pictures()))

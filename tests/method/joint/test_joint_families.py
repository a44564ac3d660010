"""Joint compression of small networks of every family: budgets, and what follows the cut."""

from collections.abc import Mapping

import pytest
import timm
import torch
from test_joint import method, scored
from torch import Tensor, nn

from families import CONVNEXT, EVA, SWIN, VIT
from nets import images, randomise
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.method.joint.reconstruct import Reconstruct
from vitrim.method.joint.settings import LocalTraining
from vitrim.network import stepwise, structure
from vitrim.network.masking import masked
from vitrim.network.surgery import cut
from vitrim.plan import Keep, Plan
from vitrim.prune import Slicing

N = 24
FEATURES = {**VIT, "num_classes": 0}
FAMILIES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "vit": ("vit_tiny_patch16_224", {**VIT, "patch_size": 8}),
    "vit without a classifier": ("vit_tiny_patch16_224", {**FEATURES, "patch_size": 8}),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", {**VIT, "patch_size": 8}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {**FEATURES, "img_size": 28}),
    "clip": ("vit_base_patch16_clip_224", VIT),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "eva-02": ("eva02_tiny_patch14_224", EVA),
    "dinov3": ("vit_small_patch16_dinov3", VIT),
    "beit": ("beit_base_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swin v2": ("swinv2_tiny_window8_256", SWIN),
    "convnext": ("convnext_atto", {**CONVNEXT, "conv_mlp": False}),
}


def net_of(family: str) -> tuple[nn.Module, int]:
    """Return a small random network and the size of its images."""
    name, args = FAMILIES[family]
    net = randomise(timm.create_model(name, pretrained=False, **args).double())
    size = args.get("img_size", 32)
    assert isinstance(size, int)
    return net, size


def divergence(dense: nn.Module, compact: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        p, q = ((net(x) / 2).log_softmax(1) for net in (dense, compact))
    return float((p.exp() * (p - q)).sum(1).mean())


def reconstructed(prune: Slicing, net: nn.Module, x: Tensor, **changes: object) -> nn.Module:
    for phase in method(**changes).recovery(prune.compact, net, prune.evidence, 7):
        assert isinstance(phase, Reconstruct)
        for batch in torch.split(x, 8):
            phase.observe(batch)
        phase.solve()
    return prune.compact


def pruned(net: nn.Module, size: int, keep: float) -> Slicing:
    joint = method()
    prune = Slicing(joint, Cost(net, size), Target(metric="macs", keep=keep))
    scorer = joint.scorer(net)
    for epoch in range(scorer.epochs):
        for batch in torch.split(images(size, batch=N), 8):
            scorer.observe(batch, epoch)
    scorer.conclude()
    prune.apply(scorer)
    return prune


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_compressed_and_reconstructed(family: str) -> None:
    net, size = net_of(family)
    x = images(size, batch=N)
    with torch.no_grad():
        before = net(x)
    prune = pruned(net, size, 0.9)
    cost = prune.cost
    assert prune.plan.edits
    assert cost.plan(prune.plan).macs <= 0.9 * cost.dense_count.macs
    if family in ("eva-02", "dinov3", "swin v2"):  # rotary positions or cosines: dims of qk stay
        assert not [keep for keep in prune.plan.keeps() if keep.site.endswith(".qk")]
    compact = reconstructed(prune, net, x)
    with torch.no_grad():
        assert torch.isfinite(compact(x)).all()
        assert torch.equal(net(x), before)


def test_the_stream_of_a_convnext_is_that_of_its_modules() -> None:
    net, _ = net_of("convnext")
    of_net, x = stepwise(net), images()
    with torch.no_grad():
        stream = of_net.embed(x)
        for step in of_net.steps:
            stream = step.advance(stream)
        features = of_net.features(net, stream, len(of_net.steps))
        assert torch.allclose(features, net.forward_features(x), rtol=1e-12, atol=1e-12)
    layers = {layer.branch for layer in structure(net).layers}
    assert {branch.name for branch in of_net.branches} == layers


def test_mlps_of_a_convnext_are_trained_on_the_compact_stream() -> None:
    net, _ = net_of("convnext")
    x = images(batch=N)
    prune = pruned(net, 32, 0.8)
    before = divergence(net, prune.compact, x)
    weights = {name: w.clone() for name, w in prune.compact.named_parameters() if ".fc1." in name}
    local = LocalTraining(epochs=4, lr=3e-3, batch=64, held_out=0.25)
    compact = reconstructed(prune, net, x, local=local, closing=False)
    assert divergence(net, compact, x) < 0.9 * before
    assert [n for n, w in weights.items() if not torch.equal(compact.get_parameter(n), w)]


def test_a_cut_convnext_computes_what_the_masked_one_does() -> None:
    net, _ = net_of("convnext")
    keeps = [
        Keep(site=site.name, index=tuple(range(0, site.size, 2)))
        for site in structure(net).sites.values()
        if site.kind == "hidden"
    ]
    plan, x = Plan(model={}, edits=tuple(keeps)), images()
    with torch.no_grad():
        assert torch.allclose(cut(net, plan)(x), masked(net, plan)(x), rtol=1e-9, atol=1e-9)
    assert scored(method("mlp"), cut(net, plan)).scores

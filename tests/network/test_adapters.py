"""PEFT's adapters on compact networks: forward, gradients, merging, saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from compacts import NETS, compact, x
from nets import TINY, relative_error, small_net
from vitrim import Int8, Plan, adapter_targets, cut
from vitrim.network.adapters import AdapterError
from vitrim.network.attention import GatheredLinear
from vitrim.network.factored import LowRankLinear, SplitLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence"),
    pytest.mark.filterwarnings("ignore:.*`torch.jit.script.*` is deprecated"),
]
FAST = ("vit", "swin", "beit", "convnext")
LAYERS = {
    "vit": ("qkv", "proj", "fc1", "fc2"),
    "swin": ("qkv", "proj", "fc1", "fc2", "reduction"),
    "convnext": ("fc1", "fc2"),
    "convnext, convolutions": ("fc1", "fc2"),
}
each = pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in NETS]
)


def adapted(family: str, targets: str | list[str], **options: object) -> PeftModel:
    """Return a compact network with random adapters, in eval mode."""
    config = LoraConfig(target_modules=targets, r=2, init_lora_weights=False, **options)
    return get_peft_model(copy.deepcopy(compact(family)), config).eval()


@each
@pytest.mark.parametrize("chosen", ["all-linear", "by name"])
def test_adapters_are_trained_saved_loaded_and_merged(
    family: str, chosen: str, tmp_path: Path
) -> None:
    targets = adapter_targets(compact(family), *LAYERS.get(family, ()))
    if not targets:
        pytest.skip("its only Linear is the classifier")
    net = adapted(family, chosen if chosen == "all-linear" and family in FAST else targets)
    logits = net(x(family))
    with torch.no_grad():
        plain = compact(family)(x(family))
    assert relative_error(logits, plain) > 1e-3
    logits.square().sum().backward()
    adapters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert len(adapters) >= 2 * len(targets)
    assert [name for name, p in adapters.items() if p.grad is None] == []

    net.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(compact(family)), tmp_path)
    with torch.no_grad():
        assert relative_error(loaded.eval()(x(family)), logits) < 1e-5

    merged = net.merge_and_unload()
    assert relative_error(merged(x(family)), logits) < 1e-5
    assert merged.state_dict().keys() == compact(family).state_dict().keys()


def test_a_new_head_is_trained_and_saved_beside_the_adapters(tmp_path: Path) -> None:
    net = adapted("vit", adapter_targets(compact("vit"), "qkv"), modules_to_save=["head"])
    with torch.no_grad():
        net.base_model.model.head.modules_to_save["default"].bias.add_(1)
    net.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(compact("vit")), tmp_path).eval()
    assert torch.equal(loaded(x("vit")), net(x("vit")))


def test_targets_are_the_linears_that_a_layer_consists_of() -> None:
    net = compact("vit")
    targets = adapter_targets(net, "qkv")
    kinds = {type(net.get_submodule(path)) for path in targets}
    parents = {type(net.get_submodule(path.rpartition(".")[0])) for path in targets}
    assert kinds == {nn.Linear}
    assert {GatheredLinear, LowRankLinear} <= parents
    assert any(isinstance(module, SplitLinear) for module in net.modules())
    assert adapter_targets(net) == adapter_targets(net, "fc2", "qkv", "fc1", "attn.proj")
    assert adapter_targets(net, "blocks.3.mlp.fc1") == [
        path for path in adapter_targets(net, "fc1") if path.startswith("blocks.3.")
    ]


def test_dense_networks_have_their_own_names() -> None:
    assert adapter_targets(small_net(depth=1), "fc1", "qkv") == [
        "blocks.0.attn.qkv",
        "blocks.0.mlp.fc1",
    ]


def test_names_without_effect_are_refused() -> None:
    with pytest.raises(AdapterError, match="no layer is named 'qkw': expected one of qkv, proj"):
        adapter_targets(compact("vit"), "qkw")
    rounded = cut(small_net(), Plan(model={}, edits=(Int8(linear="blocks.0.mlp.fc1"),)))
    with pytest.raises(AdapterError, match=r"blocks\.0\.mlp\.fc1 is in int8"):
        adapter_targets(rounded, "fc1")
    beit = timm.create_model("beit_base_patch16_224", **TINY)
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.qkv: the network reads the weight"):
        adapter_targets(beit, "qkv")
    assert not [path for path in adapter_targets(beit) if path.endswith("qkv")]


@each
def test_accelerate_trains_a_compact_network_as_a_plain_loop_does(family: str) -> None:
    net, plain = (copy.deepcopy(compact(family)).train() for _ in range(2))
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-2) for each in (net, plain)]
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(net, optimizers[0])
    torch.manual_seed(0)
    accelerator.backward(prepared(x(family)).square().mean())
    optimizer.step()
    torch.manual_seed(0)
    plain(x(family)).square().mean().backward()
    optimizers[1].step()
    trained = accelerator.unwrap_model(prepared)
    assert type(trained) is type(plain)
    for name, value in trained.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name

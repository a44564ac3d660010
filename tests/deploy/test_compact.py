"""timm's own arguments on compact networks: features, image size, classes; registration; fx."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import timm
import torch
from timm.models import FeatureGraphNet
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from compacts import NETS, compact, dense, plan, x
from fresh import python
from nets import images
from vitrim import Plan, load, save
from vitrim.deploy import compact as entrypoint
from vitrim.deploy.export import export
from vitrim.errors import VitrimError
from vitrim.plan import dumps

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence"),
    pytest.mark.filterwarnings("ignore:.*`torch.jit.script.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.searchsorted"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*nodes obtained by tracing"),  # drop path
]
FAST = ("vit", "swin", "convnext")
RESIZED = ("beit", "eva-02, GluMlp", "swin v2")
each = pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in NETS]
)
ORDERS = """
import sys
from importlib import import_module
from importlib.util import find_spec

for order in (["vitrim", "transformers", "timm"], ["timm", "vitrim"], ["vitrim", "timm"]):
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("vitrim", "timm"):
            del sys.modules[name]
    for name in order:
        find_spec("timm.models")  # as transformers does: it looks, and imports nothing
        import_module(name)
    registry = sys.modules["timm.models._registry"]
    assert registry.is_model("vitrim_compact"), order
    assert type(registry.__loader__).__module__ != "vitrim.deploy.registration"
    finders = [type(finder).__module__ for finder in sys.meta_path]
    assert "vitrim.deploy.registration" not in finders, order
    print(*order)

import timm
net = timm.create_model(sys.argv[1], pretrained=True)
assert net.num_classes == 7
"""


@cache
def folder(family: str, *, whole: bool = False) -> str:
    """Return timm's name of an exported network; `whole`, of one whose plan has no edits."""
    run = Path(mkdtemp())
    if whole:
        save(run, dense(family), Plan(model=plan(family).model, edits=()))
    else:
        save(run, compact(family), plan(family))
    return f"local-dir:{export(run, 'timm')[0]}"


def extracted(net: nn.Module, inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(net.eval()(inputs))


@each
def test_features_are_those_of_the_compact_network(family: str) -> None:
    name, args = NETS[family]
    try:
        reference = timm.create_model(name, features_only=True, out_indices=(0, 1), **args)
    except RuntimeError:
        pytest.skip("timm extracts no features from the dense network")
    net = timm.create_model(folder(family), pretrained=True, features_only=True, out_indices=(0, 1))
    features = extracted(net, x(family))
    assert type(net) is type(reference)
    assert net.feature_info.channels() == reference.feature_info.channels()
    assert [f.shape for f in features] == [f.shape for f in extracted(reference, x(family))]
    index = net.feature_info.out_indices[1]
    one = timm.create_model(
        folder(family), pretrained=True, features_only=True, out_indices=(index,)
    )
    assert torch.equal(*extracted(one, x(family)), features[1])
    with torch.no_grad():
        own = compact(family).forward_intermediates(x(family), indices=[index])[1][0]
    assert own.sum().item() == pytest.approx(features[1].sum().item(), rel=1e-4)


@pytest.mark.parametrize(
    "family",
    ["vit", "swin", *(pytest.param(f, marks=pytest.mark.slow) for f in RESIZED)],
)
def test_the_image_size_can_be_changed_as_timm_changes_it(family: str) -> None:
    if family not in NETS:
        pytest.skip("not in this timm")
    name, args = NETS[family]
    side = 2 * int(args["img_size"])
    inputs = images(side, dtype=torch.float32)
    path = folder(family, whole=True).removeprefix("local-dir:")
    net = timm.create_model(folder(family), pretrained=True, img_size=side)
    assert extracted(net, inputs)[0].shape == (7,)
    whole = timm.create_model(folder(family, whole=True), pretrained=True, img_size=side)
    twin = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={
            "file": f"{path}/model.safetensors",
            "num_classes": 7,
            "input_size": (3, side // 2, side // 2),
        },
        **{**args, "img_size": side},
    )
    assert torch.allclose(
        torch.stack(extracted(whole, inputs)), torch.stack(extracted(twin, inputs)), atol=1e-5
    )


def test_a_size_that_the_weights_cannot_take_is_refused() -> None:
    if "cait" not in NETS:
        pytest.skip("not in this timm")
    with pytest.raises(VitrimError, match="img_size=64: pos_embed cannot be resampled"):
        timm.create_model(folder("cait"), pretrained=True, img_size=64)


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_the_number_of_classes_is_that_of_the_plan(family: str) -> None:
    document = json.loads(dumps(plan(family)))
    for net in (
        timm.create_model(folder(family)),
        timm.create_model("vitrim_compact", plan=document),
    ):
        assert net.num_classes == net.pretrained_cfg["num_classes"] == 7
        assert net(x(family)).shape == (2, 7)
    other = timm.create_model("vitrim_compact", plan=document, num_classes=3)
    assert (other.num_classes, other(x(family)).shape) == (3, (2, 3))
    assert net.pretrained_cfg["architecture"] == "vitrim_compact"
    assert timm.data.resolve_model_data_config(net)["input_size"][1] == {"vit": 32}.get(family, 224)


@each
def test_features_are_extracted_by_fx_where_the_dense_network_is_traced(family: str) -> None:
    try:
        torch.fx.symbolic_trace(dense(family))
    except Exception:
        pytest.skip("the dense network cannot be traced")
    net = compact(family)
    seen = outputs_of_layers(net, x(family))
    names = [*seen][:: max(1, len(seen) // 2)]
    with torch.no_grad():
        found = create_feature_extractor(net, names)(x(family))
        of_timm = FeatureGraphNet(net, out_indices=(len(net.feature_info) - 1,))
    assert len(names) > 1
    assert all(torch.equal(found[name], seen[name]) for name in names)
    assert len(list(of_timm(x(family)))) == 1


def outputs_of_layers(net: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Return the outputs of Linears by name: of those that are called, and not changed in place.

    BEiT reads weights of qkv without calling it; Swin v2 has activations that work in place.
    """
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, module: nn.Module, args: object, output: Tensor) -> None:
        outputs.setdefault(name, (output, output.clone()))

    handles = [
        module.register_forward_hook(partial(keep, name))
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        net(inputs)
    for handle in handles:
        handle.remove()
    return {name: output for name, (output, before) in outputs.items() if output.equal(before)}


def test_the_architecture_is_registered_in_any_order_of_imports(tmp_path: Path) -> None:
    done = python("-c", ORDERS, folder("vit"), cwd=tmp_path)
    assert done.stdout.count("\n") == 3, done.stderr


def test_what_vitrim_loads_is_written_and_read_by_timm(tmp_path: Path) -> None:
    from timm.models._hub import save_for_hf

    save(tmp_path / "saved", compact("vit"), plan("vit"))
    for net in (
        load(tmp_path / "saved")[0],
        timm.create_model(folder("vit"), pretrained=True).eval(),
    ):
        save_for_hf(net, tmp_path / "timm", safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        assert torch.equal(again(x("vit")), compact("vit")(x("vit")))


def test_the_entrypoint_needs_a_plan() -> None:
    with pytest.raises(VitrimError, match="vitrim_compact is no dense network: expected a plan"):
        timm.create_model(entrypoint.ARCHITECTURE)

"""A network at hand and some images in, the compact network out."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vitrim
from command import QUICK, Command
from nets import randomise
from vitrim.data import ImageSpec
from vitrim.data.digits import Digits
from vitrim.errors import VitrimError

ARGS = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 7}
IMAGES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 7
FAST: dict[str, Any] = {"method": "oneshot", "macs": 0.7, "progress": False, "batch_size": 16}


def network(**args: object) -> nn.Module:
    torch.manual_seed(1)
    return randomise(timm.create_model("vit_tiny_patch16_224", **{**ARGS, **args}))


@pytest.fixture(scope="module")
def expected() -> vitrim.Compressed:
    return vitrim.compress(network(), IMAGES, **FAST)


def test_the_result_is_within_the_budget_and_loads_bit_equal(
    expected: vitrim.Compressed, tmp_path: Path
) -> None:
    net, plan = vitrim.load(expected.save(tmp_path / "small"))
    assert torch.equal(net(IMAGES[:2]), expected.net(IMAGES[:2]))
    assert plan == expected.plan
    assert plan.model["args"]["num_classes"] == 7
    assert expected.report["kept"]["macs"] <= 0.7
    assert expected.report["compact"]["top1"] is None
    assert expected.report["weights"]["source"] == "given"
    assert "oneshot" in repr(expected)
    assert len(repr(expected)) < 200


class Pixels(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": IMAGES[index], "labels": LABELS[index]}


def generated() -> Iterator[Tensor]:
    yield from IMAGES.split(7)


@pytest.mark.parametrize(
    "images",
    [
        DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8, shuffle=True, drop_last=True),
        DataLoader(Pixels(), batch_size=6, shuffle=True),
        [*IMAGES],
        (IMAGES, LABELS),
        Pixels(),
        generated(),
        [{"pixel_values": batch} for batch in IMAGES.split(10)],
    ],
    ids=["shuffled", "dicts", "list", "pair", "data set", "generator", "list of dicts"],
)
def test_images_in_any_form_and_order_give_the_same(
    images: object, expected: vitrim.Compressed
) -> None:
    found = vitrim.compress(network(), images, **FAST)
    assert found.plan.edits == expected.plan.edits
    assert torch.equal(found.net(IMAGES[:2]), expected.net(IMAGES[:2]))


def test_the_process_and_the_network_stay_as_they_were(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    net = network().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    draws = []
    for compressing in (False, True):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        if compressing:
            vitrim.compress(net, IMAGES, **{**FAST, "progress": True})
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert os.environ["PL_GLOBAL_SEED"] == "5"
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_bf16_inside_a_wrapper_is_given_back_as_bf16() -> None:
    wrapper = nn.Module()
    wrapper.backbone = network().bfloat16()
    found = vitrim.compress(wrapper, IMAGES.bfloat16(), backbone="backbone", **FAST)
    assert {p.dtype for p in found.net.parameters()} == {torch.bfloat16}
    with pytest.raises(VitrimError, match="backbone='backbone'"):
        vitrim.compress(wrapper, IMAGES, **FAST)


def test_a_shuffled_loader_of_digits_gives_the_commands_result(command: Command) -> None:
    words = [word for word in QUICK if "limit_" not in word]
    done = command("method=oneshot", "target.macs=0.789", *words)
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    by_command, plan = vitrim.load(done.report.parent)

    (dense,) = done.report.parents[2].glob("phases/dense-*/state.safetensors")
    net = timm.create_model(plan.model["name"], **plan.model["args"])
    state = safetensors.torch.load_file(dense)
    net.load_state_dict(
        {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
    )
    spec = ImageSpec(
        channels=1, size=(8, 8), mean=(0.5,), std=(0.5,), interpolation="bicubic", crop_pct=1.0
    )
    digits = Digits(batch_size=64, held_out=0.2, shift=0.0, rotation=0.0, label_smoothing=0.0)
    data = digits.module(spec)
    loader = DataLoader(data.train_set, batch_size=32, shuffle=True)
    found = vitrim.compress(
        net, loader, validation=data.val_set, **{**FAST, "macs": 0.789, "batch_size": 64}
    )
    for key in ("top1", "top5", "macs", "params"):
        assert found.report["compact"][key] == report["compact"][key]
    assert found.plan.edits == plan.edits
    state = by_command.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.net.state_dict().items())


@pytest.mark.parametrize("args", [{"num_classes": 0}, {"in_chans": 1, "img_size": [32, 64]}])
def test_other_outputs_channels_and_sizes(args: dict[str, object]) -> None:
    net = network(**args)
    shape = (net.patch_embed.proj.in_channels, *net.patch_embed.img_size)
    found = vitrim.compress(net, torch.randn(20, *shape), **FAST)
    assert found.report["kept"]["macs"] <= 0.7
    assert found.net(torch.randn(1, *shape)).shape == (1, net.num_classes or 24)


def test_validation_images_are_evaluated_on() -> None:
    found = vitrim.compress(network(), IMAGES, validation=(IMAGES, LABELS), **FAST)
    assert found.report["evaluated_images"] == 40
    hits = (found.net(IMAGES).argmax(1) == LABELS).float().mean()
    assert found.report["compact"]["top1"] == pytest.approx(100 * float(hits))


def test_a_method_that_needs_labels_trains_on_the_users_batches() -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8, shuffle=True)
    epochs = {"gating": {"epochs": 1, "warmup_epochs": 0}, "fine_tuning.epochs": 0}
    found = vitrim.compress(
        network(), IMAGES, "vtp", macs=0.8, train=loader, progress=False, gate_lr=0.1, **epochs
    )
    assert found.plan.method == "vtp"
    with pytest.raises(VitrimError, match=r"trains with labels.*give train=LOADER"):
        vitrim.compress(network(), IMAGES, "vtp", macs=0.8)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (IMAGES[:0], {}, "images: no images: expected at least one"),
        ([], {}, "images: no images"),
        (IMAGES, {"n_images": 64}, "n_images=64: images has 40 only"),
        (IMAGES * torch.nan, {}, "image 0 has values that are NaN"),
        (IMAGES[:, :1], {}, r"images of \(1, 32, 32\).*expects \(3, 32, 32\)"),
        (IMAGES[..., :16], {}, r"expects \(3, 32, 32\)"),
        (IMAGES.to(torch.uint8), {}, r"tensor \(40, 3, 32, 32\) of uint8: expected images"),
        ("photos", {}, "images='photos': expected a tensor"),
        ([{"image_id": 3}], {}, "a dict with image_id: expected pixel_values"),
        (IMAGES, {"method": "onshot"}, "did you mean 'oneshot'"),
        (IMAGES, {"criteria": "obs"}, "unknown key criteria of method='oneshot'.*criterion"),
        (IMAGES, {"macs": None}, "no budget: give one of macs"),
        (IMAGES, {"macs": 1.5}, r"target.macs=1.5: expected the fraction to keep"),
        (IMAGES, {"params": 0.5}, "expected at most one target"),
        (IMAGES, {"validation": IMAGES}, "validation: image 0 has no label"),
        (IMAGES, {"seed": -1}, "seed=-1: expected"),
        (
            IMAGES,
            {"method": "vtp", "fine_tuning.keep": "best", "train": [(IMAGES, LABELS)]},
            "fine_tuning.keep='best' has nothing to choose from",
        ),
        (IMAGES, {"train": [IMAGES]}, "train: batches of 40 images without labels"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    images: object, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrim.api.compress.run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(VitrimError, match=message):
        vitrim.compress(network(), images, **{**FAST, **options})

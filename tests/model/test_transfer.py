"""Compact networks with a new classifier, trained on other data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitrim
from command import QUICK, Command
from nets import MODEL, images, small_net
from vitrim.errors import ConfigError
from vitrim.model.transfer import methods_of, with_new_head
from vitrim.plan import Plan

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
SOURCE = ("model=vit_digits", "model.args.in_chans=3", "tracking=none", "progress=false")
SOURCE += ("latency.repeats=1", "trainer.log_every_n_steps=1")
NEW = ("experiment=transfer", "model.num_classes=5", "data=imagefolder", "data.workers=0")
NEW += ("data.batch_size=10", "data.mixing={mixup_alpha: 0.0, cutmix_alpha: 0.0}")
NEW += ("data.augmentation.auto_augment=null", "data.augmentation.color_jitter=0.0")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five classes of coloured squares, each with a little noise."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for name, colour in zip("abcde", COLOURS, strict=True):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = np.array(colour) * 0.7 + generator.integers(0, 60, (8, 8, 3))
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def compact(finished: Callable[..., Path]) -> Path:
    return finished(*SOURCE, "method=oneshot", "data=none", "target.params=0.8")


def transferred(command: Command, root: Path, *arguments: str) -> Path:
    done = command(*SOURCE, *NEW, f"data.root={root}", *arguments)
    assert done.code == 0, done.message
    return done.report.parent


def test_a_compact_network_learns_other_classes(
    command: Command, compact: Path, root: Path
) -> None:
    training = ("model.training.epochs=10", "model.training.lr=3e-3")
    folder = transferred(command, root, f"from_run={compact}", *training)
    report = json.loads((folder / "report.json").read_text())
    assert report["stages"].keys() == {"cut", "classify"}
    assert report["cut"]["top1"] < 60 < 90 < report["compact"]["top1"]
    assert report["dense"]["top1"] is None
    assert (report["choices"]["method"], report["variant"]) == ("transfer", "of oneshot")
    assert not [path for path in (command.out / "phases").iterdir() if path.is_dir()]
    (net, plan), (old, begun) = vitrim.load(folder), vitrim.load(compact)
    assert plan.edits == begun.edits
    assert plan.model["args"] == begun.model["args"] | {"num_classes": 5}
    assert plan.provenance["steps"] == [
        {"method": "oneshot", **begun.provenance},
        {"method": "transfer"},
    ]
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 5)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (old, net)]
    assert sizes[0] - sizes[1] == 5 * 65
    assert report["compact"]["params"] == sizes[1] < report["dense"]["params"]


def test_the_body_is_kept_and_the_head_drawn_by_the_seed(
    command: Command, compact: Path, root: Path
) -> None:
    still = ("model.training.epochs=1", "model.training.lr=0", f"from_run={compact}")
    folders = [
        transferred(command, root, *still, *more)
        for more in (("seed=0",), (f"out={command.out}/again", "seed=0"), ("seed=1",))
    ]
    old = vitrim.load(compact)[0].state_dict()
    states = [vitrim.load(folder)[0].state_dict() for folder in folders]
    for state in states:
        assert all(torch.equal(state[name], old[name]) for name in old if "head" not in name)
    assert torch.equal(states[0]["head.weight"], states[1]["head.weight"])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_a_head_of_as_many_classes_is_a_new_one(
    command: Command, compact: Path, root: Path
) -> None:
    still = ("model.training.epochs=1", "model.training.lr=0")
    first = transferred(command, root, *still, f"from_run={compact}")
    second = transferred(command, root, *still, f"from_run={first}", "seed=1")
    heads = [vitrim.load(folder)[0].get_parameter("head.weight") for folder in (first, second)]
    assert not torch.equal(*heads)


def test_the_dense_network_is_taken_along_where_its_weights_are_known(
    command: Command, root: Path
) -> None:
    dense = command(*SOURCE, "method=oneshot", "data=none", "strength=0").report.parent
    known = (f"model.checkpoint={dense}", "model.reset_head=true", "model.training.epochs=1")
    folder = transferred(command, root, f"from_run={dense}", *known)
    report = json.loads((folder / "report.json").read_text())
    assert report["variant"] == "of dense"
    assert report["stages"].keys() == {"cut", "classify"}
    assert report["dense"]["top1"] is not None
    assert len([*(command.out / "phases").glob("dense-*")]) == 1


def test_the_result_is_compressed_further_as_any_run(
    command: Command, compact: Path, root: Path
) -> None:
    folder = transferred(command, root, f"from_run={compact}", "model.training.epochs=1")
    done = command(
        *(*SOURCE, *QUICK, *NEW[1:], f"data.root={root}", f"from_run={folder}"),
        *("method=mixed_rank", "target.params=0.6", "method.tuning.training.epochs=1"),
    )
    assert done.code == 0, done.message
    _, plan = vitrim.load(done.report.parent)
    steps = [step["method"] for step in plan.provenance["steps"]]
    assert steps == ["oneshot", "transfer", "mixed_rank"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["from_run=null"], ["from_run=null", "from_run=FOLDER"]),
        (["transfer=true"], ["transfer", "method=transfer"]),
        (["strength=3"], ["method=transfer", "strength=0"]),
        (["data=none", "~data.batch_size"], ["data=none", "trains"]),
        (["model.args.depth=3"], ["from_run=", "the same model"]),
        (["model.num_classes=6"], ["5 classes", "6"]),
        (["method=vtp"], ["from_run=", "method=transfer for a new head"]),
        (["data.train=nothing"], ["no training split"]),
    ],
)
def test_what_cannot_be_transferred_is_refused(
    command: Command, compact: Path, root: Path, arguments: list[str], expected: list[str]
) -> None:
    words = [*SOURCE, *NEW, f"data.root={root}", f"from_run={compact}"]
    if "data=none" in arguments:
        words = [*SOURCE, "method=transfer", "strength=0", f"from_run={compact}", "data=none"]
        arguments = []
    keys = {word.partition("=")[0] for word in arguments}
    done = command(*(word for word in words if word.partition("=")[0] not in keys), *arguments)
    assert done.code == 1
    assert all(text in done.message for text in expected), done.message
    assert not [*command.out.rglob("recipe.yaml")]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("dinov2_vits14_lc", {"img_size": 28, "mlp_ratio": 4.0}),
    ],
)
def test_every_family_has_a_head_to_draw(name: str, args: dict[str, float]) -> None:
    changed_args = {
        "img_size": 32,
        "embed_dim": 24,
        "num_heads": 3,
        "depth": 4,
        "mlp_ratio": 2.0,
        **args,
    }
    net = small_net(name, **args, depth=4)
    old = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    model = {"name": name, "args": changed_args | {"num_classes": 3}}
    before = torch.get_rng_state()
    new, plan = with_new_head(net, Plan(model={}, edits=()), model, 3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert new(images(28 if "img_size" in args else 32)).shape == (2, 3)
    assert not any(module.training for module in new.modules())
    changed = {key for key, tensor in new.state_dict().items() if not _same(tensor, old[key])}
    assert changed
    assert all("head" in key for key in changed)
    assert methods_of(plan) == "of dense"


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def test_a_network_cut_where_its_head_reads_is_refused() -> None:
    net = small_net()
    net.embed_dim = 23  # the width that timm gives a new head
    with pytest.raises(ConfigError, match=r"reads \(head.weight has shape"):
        with_new_head(net, Plan(model={}, edits=()), MODEL, 7, seed=0)

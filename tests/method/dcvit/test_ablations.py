"""The nine ablations of DC-ViT's Table 6 in the small: each network has what its row says."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitrim
from command import QUICK, folder_of
from vitrim.budget.cost import Cost
from vitrim.files import WEIGHTS, sha256
from vitrim.method.dcvit.accounting import paper_macs
from vitrim.plan import Plan

pytestmark = pytest.mark.slow  # the options one by one are in test_dcvit.py and test_trials.py
DATA = Path(__file__).parents[4] / "shared" / "data"
TAR, CHECKPOINT = DATA / "imagenet_mini.tar", DATA / "vit_tiny_patch16_224.safetensors"
ROWS: dict[str, tuple[str, ...]] = {
    "default": (),
    "top_k": ("progressive=false",),
    "top_k_longer": ("progressive=false", "tuning.training.epochs=LONGER"),
    "whole_network": ("tuning.freeze_tail=false",),
    "one_more": ("extra_blocks=1",),
    "redrawn": ("unit_selection=none",),
    "activation": ("unit_selection=activation",),
    "mse": ("distance=mse",),
    "class_token": ("tuning.mimic=class",),
}
"""Options of the method, as in the headers of the overlays."""


@dataclass
class Row:
    """The finished run of one ablation."""

    folder: Path

    @cached_property
    def loaded(self) -> tuple[nn.Module, Plan]:
        return vitrim.load(self.folder)

    @property
    def net(self) -> nn.Module:
        return self.loaded[0].eval()

    @property
    def plan(self) -> Plan:
        return self.loaded[1]

    @property
    def blocks(self) -> list[str]:
        blocks: list[str] = self.plan.provenance["blocks"]
        return blocks

    @property
    def trainings(self) -> dict[str, int]:
        """How many steps each phase logged, by its name."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return Counter(line["phase"] for line in map(json.loads, lines) if "loss" in line)

    def json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / name).read_text())
        return content


@dataclass
class Table:
    """The nine runs of one network, and that network."""

    rows: dict[str, Row]
    dense: nn.Module
    images: Tensor

    def __getitem__(self, name: str) -> Row:
        return self.rows[name]

    @property
    def cost(self) -> Cost:
        return Cost(self.dense, self.images.shape[-1])


def table(out: Path, overlay: str, longer: int, *words: str) -> dict[str, Row]:
    """Run all rows below `out`."""
    rows = {}
    for name, options in ROWS.items():
        own = [f"method.{option}".replace("LONGER", str(longer)) for option in options]
        rows[name] = Row(folder_of(f"experiment=dcvit/{overlay}", f"out={out}", *words, *own))
    return rows


SHORT = (
    "seed=2",
    "model.args.depth=7",
    "method.protected=[1,2]",
    "method.synthetic.iterations=2",
    "method.trial.training.epochs=1",
    "method.tuning.training.epochs=1",
    "method.sampling.images=128",
    "trainer.limit_val_batches=1",
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Table:
    out = tmp_path_factory.mktemp("digits")
    rows = table(out, "table6_digits", 2, *QUICK, *SHORT)
    model = rows["default"].plan.model
    dense = timm.create_model(model["name"], **model["args"])
    (trained,) = out.glob("phases/dense-*/state.safetensors")
    state = safetensors.torch.load_file(trained)
    dense.load_state_dict({name.removeprefix("net."): value for name, value in state.items()})
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Table(rows, dense.eval(), images)


@pytest.fixture(scope="module")
def vit_tiny(tmp_path_factory: pytest.TempPathFactory) -> Table:
    if not (TAR.is_file() and CHECKPOINT.is_file()):
        pytest.skip(f"no real weights and images in {DATA}")
    out, pictures = tmp_path_factory.mktemp("vit_tiny"), tmp_path_factory.mktemp("imagenet")
    with tarfile.open(TAR) as archive:
        archive.extractall(pictures, filter="data")
    short = (
        "data.workers=0",
        "trainer.limit_val_batches=1",
        "trainer.log_every_n_steps=1",
        "method.protected=[1,6]",
        "method.synthetic.images=16",
        "method.synthetic.iterations=3",
    )
    rows = table(
        out,
        "table6_vit_tiny",
        2,
        *("latency.repeats=1", "tracking=none", "progress=false"),
        *(f"data.root={pictures}", f"model.checkpoint={CHECKPOINT}", *short),
        *("method.trial.training.epochs=1", "method.tuning.training.epochs=1"),
    )
    model = rows["default"].plan.model
    dense = timm.create_model(model["name"], **model["args"])
    dense.load_state_dict(safetensors.torch.load_file(CHECKPOINT))
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return Table(rows, dense.eval(), images)


@pytest.fixture(scope="module", params=["digits", "vit_tiny"])
def nine(request: pytest.FixtureRequest) -> Table:
    found: Table = request.getfixturevalue(request.param)
    return found


def test_nine_rows_are_nine_networks_of_equal_macs(nine: Table) -> None:
    assert len(nine.rows) == 9
    assert len({sha256(row.folder / WEIGHTS) for row in nine.rows.values()}) == 9
    total, block, blocks = paper_macs(nine.cost)
    keep = nine["default"].json("report.json")["target"]["keep"]
    for name, row in nine.rows.items():
        widths = dict(zip(row.blocks, row.plan.provenance["widths"], strict=True))
        sizes = {b: nine.cost.structure.sites[f"{b}.mlp.hidden"].size for b in widths}
        removed = sum(
            blocks[b].attention + blocks[b].mlp * (1 - width / sizes[b])
            for b, width in widths.items()
        )
        units = sum(blocks[b].mlp / sizes[b] for b in widths)
        assert -1 <= removed - keep * block <= units, name
        assert total > removed


def test_every_row_trains_once_for_each_block_but_those_that_compress_all_at_once(
    nine: Table,
) -> None:
    k = len(nine["default"].blocks)
    assert len(nine["one_more"].blocks) == k + 1
    assert min(nine["one_more"].plan.provenance["widths"]) > max(
        nine["default"].plan.provenance["widths"]
    )
    for name, row in nine.rows.items():
        stages, n = set(row.json("report.json")["stages"]), len(row.blocks)
        if "top_k" in name:
            assert stages == {"cut", "mimic"}
            assert row.plan.provenance["reused_trial"] is None
            continue
        later = {f"mimic-{number}" for number in range(2, n + 1)}
        assert stages == {"cut", "mimic", *later}, name
        assert set(row.trainings) - {"dense", "score"} == later  # the first step is the trial
        assert row.plan.provenance["reused_trial"] == row.blocks[0], name


def test_all_at_once_compresses_the_same_blocks(nine: Table) -> None:
    first, longer = nine["top_k"], nine["top_k_longer"]
    assert first.plan.edits == longer.plan.edits == nine["default"].plan.edits
    assert longer.trainings["mimic"] == 2 * first.trainings["mimic"] > 0


def changed(nine: Table, name: str) -> set[str]:
    """Return the blocks that are not compressed and differ from the dense network's."""
    row, dense = nine[name], dict(nine.dense.named_parameters())
    return {
        ".".join(path.split(".")[:2])
        for path, value in row.net.named_parameters()
        if path.startswith("blocks.")
        and not path.startswith(tuple(f"{block}." for block in row.blocks))
        and not torch.equal(value, dense[path])
    }


def test_the_tail_is_trained_in_its_own_row_only(nine: Table) -> None:
    depth = len(nine.dense.blocks)  # type: ignore[arg-type]
    frozen = 0
    for name, row in nine.rows.items():
        last = max(int(block.split(".")[1]) for block in row.blocks)
        tail = {f"blocks.{at}" for at in range(last + 2, depth)}
        if name == "whole_network":
            assert changed(nine, name) >= {f"blocks.{depth - 1}"}
        else:
            assert not changed(nine, name) & tail, name
            frozen += len(tail)
    assert frozen


def nearest(nine: Table, name: str) -> Tensor:
    """Return the cosine of each row of fc1 in compressed blocks to the nearest dense row."""
    cosines = []
    for block in nine[name].blocks:
        ours, theirs = (
            F.normalize(net.get_parameter(f"{block}.mlp.fc1.weight").detach(), dim=1)
            for net in (nine[name].net, nine.dense)
        )
        cosines.append((ours @ theirs.T).amax(1))
    return torch.cat(cosines)


def test_redrawn_mlps_have_nothing_of_the_dense_ones(nine: Table) -> None:
    assert nearest(nine, "default").min() > 0.95
    assert nearest(nine, "redrawn").max() < 0.9
    for block in nine["redrawn"].blocks:  # the first of them is the trial's
        assert nine["redrawn"].net.get_parameter(f"{block}.mlp.fc1.weight").std() < 0.03


def test_units_are_chosen_by_activation_in_one_row(nine: Table) -> None:
    kept = {
        name: {keep.site: keep.index for keep in nine[name].plan.keeps()}
        for name in ("default", "activation")
    }
    assert kept["default"] != kept["activation"]
    for site, index in kept["activation"].items():
        means = activations(nine, site.removesuffix(".mlp.hidden"))
        others = [unit for unit in range(len(means)) if unit not in set(index)]
        assert means[list(index)].mean() > means[others].mean()


@torch.no_grad()
def activations(nine: Table, block: str) -> Tensor:
    """Return the mean activation of each unit of a block without its attention, (M,)."""
    streams: list[Tensor] = []
    module = nine.dense.get_submodule(block)
    handle = module.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    nine.dense(nine.images)
    handle.remove()
    mlp: Any = module.mlp
    units: Tensor = mlp.act(mlp.fc1(module.norm2(streams[0])))  # type: ignore[operator]
    return units.mean((0, 1))


def test_distances_of_features_rank_other_blocks(nine: Table) -> None:
    scores = {name: nine[name].json("diagnostics.json")["trials"] for name in nine.rows}
    assert scores["default"] == scores["top_k"] == scores["top_k_longer"]
    assert scores["mse"].keys() == scores["default"].keys()
    orders = [sorted(scores[name], key=scores[name].__getitem__) for name in ("default", "mse")]
    assert orders[0] != orders[1]
    assert [nine[name].blocks for name in ("default", "mse")] == [
        order[: len(nine["default"].blocks)] for order in orders
    ]


@torch.no_grad()
def test_the_class_token_alone_is_mimicked_in_one_row(nine: Table) -> None:
    wanted = nine.dense.forward_features(nine.images)  # type: ignore[operator]
    shares = {}
    for name in ("default", "class_token"):
        features = nine[name].net.forward_features(nine.images)  # type: ignore[operator]
        errors = (features - wanted).square().mean((0, 2))
        shares[name] = errors[0] / errors[1:].mean()
    assert shares["class_token"] < shares["default"]

"""`vitrim.Prune` in somebody else's LightningModule: gates, L1 term, optimisers, slicing."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, AdamW, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import callbacks
import vitrim
from nets import small_net
from vitrim.api.gates import Gate
from vitrim.errors import VitrimError
from vitrim.method.vtp import GateTraining
from vitrim.network.surgery import cut
from vitrim.trainer.recipe import Recipe

KEYS: dict[str, Any] = {"macs": 0.7, "l1": 1e-3, "gate_lr": 0.05}


class Own(LightningModule):
    """A module of somebody who knows nothing of vitrim."""

    def __init__(self, *, early: bool = False, schedule: str = "", sgd: bool = False) -> None:
        super().__init__()
        self.backbone = small_net(dtype=torch.float32).train()
        self.make = (lambda p: SGD(p, lr=0.01)) if sgd else (lambda p: AdamW(p, lr=0.01))
        self.early = self.make(self.parameters()) if early else None
        self.schedule = schedule
        self.rates: list[list[float]] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.backbone(images), labels)

    def configure_optimizers(self) -> Any:
        optimizer = self.early or self.make(self.parameters())
        schedules: dict[str, Callable[[], Any]] = {
            "lambda": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
            "one cycle": lambda: lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=8),
            "sequential": lambda: lr_scheduler.SequentialLR(
                optimizer,
                [
                    lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
                    lr_scheduler.CosineAnnealingLR(optimizer, 6),
                ],
                [2],
            ),
        }
        if not self.schedule:
            return optimizer
        scheduler = schedules[self.schedule]()
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_batch_start(self, batch: object, index: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def loader(batch: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(16) % 7), batch_size=batch)


def fit(
    module: LightningModule,
    *callbacks: Any,
    batch: int = 4,
    ckpt: Path | None = None,
    **options: Any,
) -> None:
    settings = {"max_epochs": 2, "enable_checkpointing": False, **options}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
        **settings,
    )
    trainer.fit(module, loader(batch), ckpt_path=ckpt, weights_only=False if ckpt else None)


def pruned(module: LightningModule | None = None, **options: Any) -> tuple[Any, vitrim.Prune]:
    module, prune = module or Own(), vitrim.Prune(**KEYS)
    fit(module, prune, **options)
    return module, prune


def close(one: nn.Module, two: nn.Module, tolerance: float = 1e-5) -> bool:
    states = one.state_dict(), two.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.allclose(states[0][name], states[1][name], atol=tolerance) for name in states[0]
    )


def test_the_compact_network_is_the_cut_of_the_trained_one(tmp_path: Path) -> None:
    module, prune = pruned()
    dense, compact = (vitrim.count(net, 32).macs for net in (module.backbone, prune.compact))
    assert 0.6 * dense < compact <= 0.7 * dense
    assert not [m for m in module.modules() if isinstance(m, Gate)]
    assert close(cut(module.backbone, prune.plan), prune.compact, 0)
    assert prune.plan.method == "vtp"
    vitrim.save(tmp_path, prune.compact, prune.plan)
    images = next(iter(loader()))[0]
    net = prune.compact.eval()
    assert torch.equal(vitrim.load(tmp_path)[0](images), net(images))

    again = Own()
    again.backbone = prune.compact.train()
    fit(again, max_epochs=1)


def test_a_step_is_that_of_the_loss_with_the_l1_term() -> None:
    module, prune = Own(sgd=True), vitrim.Prune(macs=0.7, l1=0.1)
    reference = GateTraining(
        copy.deepcopy(module.backbone),
        recipe=Recipe(epochs=1, lr=0.01, weight_decay=0, warmup_epochs=0, clip_norm=0),
        l1=0.1,
        gate_lr=0.01,
    )
    reference.log_dict = lambda *args, **options: None  # type: ignore[method-assign,assignment]
    optimizer = SGD(reference.parameters(), lr=0.01)
    for batch in loader():
        optimizer.zero_grad()
        reference.training_step(batch, 0).backward()
        optimizer.step()
    scores = reference.evidence().scores
    fit(module, _Keep(prune), prune, max_epochs=1)
    for site, score in scores.items():
        assert torch.allclose(_Keep.scores[site], score, atol=1e-6)
    assert any(((score - 1).abs() > 1e-4).any() for score in scores.values())
    assert close(module.backbone, reference.net)


def test_with_the_commands_recipe_and_images_the_callback_is_the_command(tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, lr=1e-3, weight_decay=0.05, warmup_epochs=0.5, clip_norm=1.0)
    net = small_net(**callbacks.ARGS | {"embed_dim": 16, "depth": 2}, dtype=torch.float32)
    command = callbacks.by_the_command(net, tmp_path, 0, recipe)
    prune = callbacks.by_the_callback(net, 0, recipe, same_draws=True)
    assert any(((score - 1).abs() > 0.01).any() for score in command.evidence.scores.values())
    assert prune.plan.edits == command.plan.edits
    assert close(prune.compact, command.compact, 0)


@pytest.mark.slow
def test_right_after_the_cut_the_callback_is_as_accurate_as_the_command(tmp_path: Path) -> None:
    net = callbacks.dense(tmp_path)
    rows = [callbacks.row(tmp_path, net, seed) for seed in range(3)]
    command, callback = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    assert abs(command - callback) < 5, rows


class _Keep(Callback):
    """Remember the gates before they are folded."""

    scores: dict[str, Tensor] = {}

    def __init__(self, prune: vitrim.Prune) -> None:
        self.prune = prune

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gates = self.prune._gates
        assert gates is not None
        type(self).scores = gates.scores()


def test_accumulated_batches_are_one_step() -> None:
    whole, one = pruned(Own(sgd=True))
    parts, two = pruned(Own(sgd=True), batch=2, accumulate_grad_batches=2)
    assert close(whole.backbone, parts.backbone)
    assert one.plan.edits == two.plan.edits


def test_optimisers_made_before_the_gates_train_them_as_well() -> None:
    after, one = pruned(Own())
    before, two = pruned(Own(early=True))
    assert close(after.backbone, before.backbone, 0)
    assert one.plan.edits == two.plan.edits


@pytest.mark.parametrize("schedule", ["lambda", "one cycle", "sequential"])
def test_the_rate_of_the_gates_follows_the_schedule_of_the_weights(schedule: str) -> None:
    module, _ = pruned(Own(schedule=schedule))
    assert len({weights for weights, _ in module.rates}) > 3
    for weights, gates in module.rates:
        assert gates == pytest.approx(
            weights * KEYS["gate_lr"] / module.rates[0][0] * _first(module)
        )


def _first(module: Own) -> float:
    """Return the first rate of the weights as a share of the base rate."""
    return module.rates[0][1] / KEYS["gate_lr"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_stopped_fit_resumes_with_its_gates(tmp_path: Path) -> None:
    whole, one = pruned()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(Own(), vitrim.Prune(**KEYS), keep, enable_checkpointing=True, max_epochs=1)
    resumed, two = Own(), vitrim.Prune(**KEYS)
    fit(resumed, two, keep, enable_checkpointing=True, ckpt=tmp_path / "epoch=0.ckpt")
    assert close(whole.backbone, resumed.backbone, 0)
    assert one.plan.edits == two.plan.edits


def test_averaged_weights_and_gates_are_cut() -> None:
    module, prune = Own(), vitrim.Prune(**KEYS)
    fit(module, prune, EMAWeightAveraging(decay=0.5))
    assert close(cut(module.backbone, prune.plan), prune.compact, 0)
    assert not close(module.backbone, pruned()[0].backbone)
    with pytest.raises(VitrimError, match=r"put vitrim\.Prune before EMAWeightAveraging"):
        fit(Own(), EMAWeightAveraging(), vitrim.Prune(**KEYS))


def test_nothing_is_removed_at_strength_0() -> None:
    module, plain, prune = Own(), Own(), vitrim.Prune(strength=0)
    fit(module, prune)
    fit(plain)
    assert close(prune.compact, plain.backbone, 0)
    assert prune.plan.edits == ()


def test_the_network_is_found_or_named() -> None:
    several = Own()
    several.teacher = small_net(dtype=torch.float32).train()
    with pytest.raises(VitrimError, match="Own holds several networks: name one of them, module="):
        fit(several, vitrim.Prune(**KEYS))
    with pytest.raises(
        VitrimError, match=r"module='net': Own has no such module; can be.* backbone"
    ):
        fit(several, vitrim.Prune(**KEYS, module="net"))
    prune = vitrim.Prune(**KEYS, module="backbone")
    fit(several, prune, max_epochs=1)
    assert prune.plan.edits
    none = Own()
    none.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))
    with pytest.raises(VitrimError, match="Own holds no network of timm that can be cut"):
        fit(none, vitrim.Prune(**KEYS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "oneshot", "macs": 0.5}, r"trains no gates: expected vtp; .*vitrim\.compress"),
        ({"macs": 0.5, "gating": {"epochs": 3}}, "gating: the module's own optimiser trains"),
        ({"macs": 0.5, "fine_tuning.epochs": 3}, "fine_tuning.epochs: the module's own optimiser"),
        ({"latency": 0.5}, "latency=0.5: the callback measures no time"),
        ({"macs": 0.5, "L1": 1}, "unknown key L1"),
        ({}, "no budget: give one of"),
    ],
)
def test_what_has_no_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(VitrimError, match=message):
        vitrim.Prune(**settings)


DDP = """
import os, sys
sys.path[:0] = [{api!r}, {tests!r}]
from lightning import Trainer
from torch.utils.data import DataLoader, DistributedSampler
from test_callback import KEYS, Own, loader
import vitrim

prune = vitrim.Prune(**KEYS)
module = Own(sgd=True)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, callbacks=[prune],
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    use_distributed_sampler=False,  # Lightning's would shuffle
)
data, rank = loader().dataset, int(os.environ.get("LOCAL_RANK", 0))
sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
trainer.fit(module, DataLoader(data, batch_size=2, sampler=sampler))
if trainer.is_global_zero:
    vitrim.save({out!r}, prune.compact, prune.plan)
"""


@pytest.mark.slow
def test_two_processes_train_and_cut_as_one_does(tmp_path: Path) -> None:
    here = Path(__file__).parent
    text = DDP.format(api=str(here), tests=str(here.parent), out=str(tmp_path / "out"))
    (tmp_path / "script.py").write_text(text)
    words = [sys.executable, "-W", "ignore", "script.py"]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    net, plan = vitrim.load(tmp_path / "out")
    _, prune = pruned(Own(sgd=True))
    assert plan.edits == prune.plan.edits
    assert close(net, prune.compact)

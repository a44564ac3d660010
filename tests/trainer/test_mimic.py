"""Losses without labels against what they are by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nets import images, plan_of, small_net
from vitrim import cut
from vitrim.trainer.mimic import Distill, Mimic, soft_loss
from vitrim.trainer.recipe import Recipe

RECIPE = Recipe(epochs=1, lr=1e-3, weight_decay=0.0, warmup_epochs=0, clip_norm=0.0)


def student_of(net: nn.Module) -> nn.Module:
    return cut(net, plan_of({"blocks.0.mlp.hidden": range(20)})).train()


def loss_of(phase: Mimic | Distill, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr(phase, "log", lambda *args, **kwargs: None)
    return phase.training_step((images(), torch.full((2,), -1)), 0)


def test_mimicking_is_the_squared_error_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = small_net()
    student = student_of(teacher)
    loss = loss_of(Mimic(student, teacher, recipe=RECIPE), monkeypatch)
    ours, theirs = (net.forward_features(images()) for net in (student, teacher))
    assert torch.allclose(loss, (ours - theirs).square().mean())
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.blocks[0].mlp.fc1.weight.grad is not None


def test_what_the_classifier_reads_is_added_by_its_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = small_net()
    student = student_of(teacher)
    alone, more = (
        loss_of(Mimic(student, teacher, recipe=RECIPE, pooled_weight=pooled), monkeypatch)
        for pooled in (0.0, 0.5)
    )
    ours, theirs = (net.forward_features(images())[:, 0] for net in (student, teacher))
    assert torch.allclose(more, alone + 0.5 * (ours - theirs).square().mean())


def test_logits_are_added_by_their_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = small_net()
    student = student_of(teacher)
    alone, mixed, soft = (
        loss_of(phase, monkeypatch)
        for phase in (
            Mimic(student, teacher, recipe=RECIPE),
            Mimic(student, teacher, recipe=RECIPE, logits_weight=0.5, temperature=2.0),
            Distill(student, teacher, recipe=RECIPE, temperature=2.0),
        )
    )
    assert torch.allclose(mixed, alone + 0.5 * soft)


def test_distilling_is_the_divergence_from_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, found = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = (wanted / 2).softmax(-1)
    by_hand = 4 * (p * (p.log() - torch.tensor(0.5).log())).sum()
    assert torch.allclose(soft_loss(found, wanted, 2.0), by_hand)
    net = small_net()
    loss = loss_of(Distill(net, net, recipe=RECIPE, temperature=1.0), monkeypatch)
    assert loss.item() == 0.0


@pytest.mark.parametrize("logits", [0.0, 1.0])
def test_the_classifier_is_the_teachers_unless_it_is_trained(logits: float) -> None:
    teacher = small_net()
    student = student_of(small_net(seed=1))
    Mimic(student, teacher, recipe=RECIPE, logits_weight=logits).on_fit_start()
    assert torch.equal(student.head.weight, teacher.head.weight) == (not logits)


def test_what_is_frozen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = small_net()
    phase = Mimic(student_of(teacher), teacher, recipe=RECIPE, frozen=["blocks.0.mlp.fc1.weight"])
    monkeypatch.setattr(phase, "_trainer", SimpleNamespace(estimated_stepping_batches=3))
    optimiser = phase.configure_optimizers()["optimizer"]
    trained = {id(p) for group in optimiser.param_groups for p in group["params"]}
    assert id(phase.net.blocks[0].mlp.fc1.weight) not in trained
    assert id(phase.net.blocks[0].mlp.fc1.bias) in trained
    phase.on_fit_end()
    assert all(parameter.requires_grad for parameter in phase.net.parameters())


@pytest.mark.parametrize("kind", [Mimic, Distill])
def test_the_teacher_is_neither_trained_nor_saved(kind: type) -> None:
    options = {"temperature": 1.0} if kind is Distill else {}
    phase = kind(student_of(small_net()), small_net(), recipe=RECIPE, **options)
    assert {name.split(".")[0] for name, _ in phase.named_parameters()} == {"net"}

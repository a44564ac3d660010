"""Fine-tuning with a teacher: DeiT's losses, the teacher's images, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from command import QUICK, Command
from identities import identified
from phase_runner import SPEC
from refusals import assert_refused
from vitrim.data import ImageSpec
from vitrim.errors import ConfigError
from vitrim.model.teacher import Teacher
from vitrim.trainer.distillation import Distillation, Kind

ARGS = {"in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
KEYS = (
    "teacher.name=vit_tiny_patch16_224",
    "teacher.num_classes=10",
    "teacher.image_size=16",
    *(f"+teacher.args.{key}={value}" for key, value in ARGS.items()),
)
SHORT = ("model.args.depth=1", "method.gating.epochs=1", "method.fine_tuning.epochs=1", *QUICK)
SET: dict[str, Any] = {
    "name": "resnet18",
    "checkpoint": None,
    "sha256": None,
    "num_classes": None,
    "image_size": None,
    "mean": None,
    "std": None,
    "args": {},
    "distillation": "hard",
    "alpha": None,
    "temperature": None,
}


class Fixed(nn.Module):
    """A teacher with the logits (0, 2) for every image; it keeps what it saw."""

    seen: Tensor

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return torch.tensor([[0.0, 2.0]]).expand(len(images), -1)


def distillation(kind: Kind, alpha: float, **changes: Any) -> Distillation:
    arguments: dict[str, Any] = {"temperature": 2.0, "images": SPEC, "expected": SPEC}
    return Distillation(
        teacher=Fixed(), kind=kind, alpha=alpha, settings={}, **{**arguments, **changes}
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    net = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=16, **ARGS)
    path = tmp_path / "teacher.safetensors"
    safetensors.torch.save_file(net.state_dict(), path)
    return str(path)


def test_the_losses_are_those_of_the_paper() -> None:
    images, logits = torch.zeros(3, 1, 8, 8), torch.tensor([[1.0, 0.0]] * 3)
    ce = torch.tensor(0.7)
    hard = distillation("hard", 0.25).loss(images, logits, ce)
    assert float(hard) == pytest.approx(0.75 * 0.7 + 0.25 * float(torch.tensor(1.0).exp().log1p()))
    soft = distillation("soft", 0.25).loss(images, logits, ce)
    teacher, student = (torch.tensor(x).softmax(-1) for x in ([0.0, 1.0], [0.5, 0.0]))
    kl = float((teacher * (teacher / student).log()).sum())
    assert float(soft) == pytest.approx(0.75 * 0.7 + 0.25 * 4 * kl)


def test_the_teacher_sees_images_as_it_expects_them() -> None:
    expected = ImageSpec(
        channels=1, size=(16, 16), mean=(0.5,), std=(0.2,), interpolation="bicubic", crop_pct=1.0
    )
    pixels = torch.rand(2, 1, 1, 1).expand(-1, -1, 8, 8)
    found = distillation("hard", 0.5, expected=expected)
    found.loss((pixels - 0.3) / 0.4, torch.zeros(2, 2), torch.tensor(0.0))
    seen = found.teacher.seen
    assert isinstance(seen, Tensor)
    assert seen.shape == (2, 1, 16, 16)
    torch.testing.assert_close(seen * 0.2 + 0.5, pixels[..., :1, :1].expand_as(seen))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "resnet19"}, "teacher.name=resnet19.*resnet18"),
        ({"name": [1]}, r"teacher.name=\[1\]: .*timm.list_models"),
        ({"distillation": "warm"}, "teacher.distillation=warm: expected hard or soft"),
        ({"alpha": 1.5}, "teacher.alpha=1.5"),
        ({"temperature": 2.0}, "teacher.temperature=2.0: expected null, or with distillation=soft"),
        ({"num_classes": 10}, "teacher.num_classes=10: expected null, or with teacher.checkpoint"),
        ({"sha256": "0"}, "teacher.sha256"),
        ({"mean": [0.5]}, r"teacher.mean=\[0.5\]: expected 3 numbers"),
        ({"args": {"depht": 3}}, "teacher.name=resnet18.*depht"),
        ({"args": {"checkpoint_path": "net.pth"}}, "checkpoint_path are not allowed"),
        ({"args": {"pretrained_cfg": {"file": "net.pth"}}}, "pretrained_cfg are not allowed"),
        ({"checkpoint": "https://x.org/y.pth"}, "teacher.checkpoint=https.*an address"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Teacher(**{**SET, **changes})


def test_numbers_left_out_are_those_of_the_paper(checkpoint: str) -> None:
    own = {"name": "vit_tiny_patch16_224", "checkpoint": checkpoint, "num_classes": 10}
    for kind, alpha in (("hard", 0.5), ("soft", 0.1)):
        teacher = Teacher(**{**SET, **own, "image_size": 16, "args": ARGS, "distillation": kind})
        built = teacher.build(SPEC)
        assert (built.alpha, built.temperature) == (alpha, 3.0)
        assert not built.teacher.training
        assert built.expected.size == (16, 16)
        state = safetensors.torch.load_file(checkpoint)
        assert all(torch.equal(state[k], v) for k, v in built.teacher.state_dict().items())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["teacher.alpha=0.5"], ["teacher.alpha=0.5", "teacher.name"]),
        (["teacher.nme=x"], ["teacher.nme", "name"]),
        (["teacher=regnety_160"], ["1000 classes", "10", "teacher.checkpoint"]),
        (["teacher=regnety_160"], ["3 channels", "have 1"]),
        ([*KEYS, "teacher.checkpoint=/none.pth"], ["teacher.checkpoint=/none.pth: no such file"]),
        (
            [*KEYS, "teacher.checkpoint=/none/model.safetensors"],
            ["teacher.checkpoint=/none/model.safetensors: no such file"],
        ),
    ],
)
def test_a_run_is_refused_before_it_starts(
    command: Command, words: list[str], expected: list[str]
) -> None:
    assert_refused(command, *SHORT, *words, expected=expected)


@pytest.mark.parametrize("words", [("method=joint",), ("method=cd", "method.fine_tuning.epochs=0")])
def test_without_a_training_on_labels_it_is_refused(
    command: Command, words: tuple[str, ...]
) -> None:
    assert_refused(
        command, *QUICK, "teacher=regnety_160", *words, expected=[words[0], "fine-tuning", "labels"]
    )


def test_fine_tuning_learns_from_it(command: Command, checkpoint: str) -> None:
    words = (*SHORT, "strength=3", "trainer.limit_val_batches=1.0")
    alone = command(*words)
    taught = command(*words, *KEYS, f"teacher.checkpoint={checkpoint}", "control=true")
    assert taught.code == 0, taught.message
    reports = [json.loads(done.report.read_text()) for done in (alone, taught)]
    assert "teacher" not in reports[0]
    assert reports[1]["teacher"]["name"] == "vit_tiny_patch16_224"
    assert "checkpoint" not in reports[1]["teacher"]
    states = [
        safetensors.torch.load_file(done.report.parent / "model.safetensors")
        for done in (alone, taught)
    ]
    assert any(not torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert len([*(command.out / "phases").glob("dense-*")]) == 1  # shared with the run without it
    assert len([*(command.out / "phases").glob("score-*")]) == 1


def test_it_identifies_a_run_wherever_its_file_is(checkpoint: str, tmp_path: Path) -> None:
    other = tmp_path / "moved.safetensors"
    other.write_bytes(Path(checkpoint).read_bytes())
    none, one, two, soft = (
        _identity(checkpoint=where, words=words)
        for where, words in (
            (None, ()),
            (checkpoint, KEYS),
            (str(other), KEYS),
            (checkpoint, (*KEYS, "teacher.distillation=soft")),
        )
    )
    assert none != one == two != soft


def _identity(*, checkpoint: str | None, words: tuple[str, ...]) -> str:
    where = () if checkpoint is None or not words else (f"teacher.checkpoint={checkpoint}",)
    return identified(*words, *where).identity.digest

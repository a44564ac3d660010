"""What renames a run: all that changes its result, and nothing that changes only its speed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
from omegaconf import OmegaConf
from PIL import Image

from command import QUICK, Command
from identities import Identified, identified, write_images
from vitrim.cli.recipe import check_resumable
from vitrim.errors import ConfigError
from vitrim.pipeline import Identity

SHORT = ("model.num_classes=2", "model.args.in_chans=3", "model.args.depth=1", "method=fskd")


def keys(identity: Identity) -> tuple[str, str, str]:
    return identity.digest, identity.dense_key, identity.start_key


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def files(root: Path) -> tuple[str, ...]:
    return (*SHORT, "data=imagefolder", f"data.root={root}")


@pytest.fixture(scope="module")
def plain(files: tuple[str, ...]) -> Identified:
    return identified(*files)


@pytest.mark.parametrize(
    "words",
    [
        (
            "data.workers=0", "progress=false", "tracking=none", "latency.repeats=1",
            "trainer.log_every_n_steps=1", "trainer.check_val_every_n_epoch=1",
            "trainer.num_sanity_val_steps=2", "+trainer.val_check_interval=0.5",
            "trainer.accelerator=auto", "trainer.strategy=ddp", "+trainer.num_nodes=1",
            "data.bad_images.limit=3",
        ),
        ("model.training.keep=last", "trainer.compile=false"),
        ("trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=128"),
        ("trainer.devices=[0,1]", "+trainer.num_nodes=2", "data.batch_size=64"),
        ("+trainer.accumulate_grad_batches=4", "data.batch_size=64"),
    ],
)  # fmt: skip
def test_settings_of_speed_are_no_part_of_a_run(
    files: tuple[str, ...], plain: Identified, words: tuple[str, ...]
) -> None:
    assert keys(identified(*files, *words).identity) == keys(plain.identity)


@pytest.mark.parametrize(
    "words",
    [
        ("trainer.precision=bf16-mixed",),
        ("trainer.compile=true",),
        ("trainer.devices=2", "trainer.strategy=ddp"),
        ("+trainer.accumulate_grad_batches=2",),
        ("data.batch_size=64",),
        ("batchnorm_images=16",),
        ("data.samples=4",),
        ("seed=1",),
        ("trainer.limit_train_batches=2",),
        ("model.training.lr=0.1",),
        ("model.training.keep=best",),
    ],
)
def test_what_changes_the_result_is(
    files: tuple[str, ...], plain: Identified, words: tuple[str, ...]
) -> None:
    assert not {*keys(identified(*files, *words).identity)} & {*keys(plain.identity)}


def test_validations_decide_the_result_of_a_run_that_keeps_the_best(
    files: tuple[str, ...],
) -> None:
    best = ("model.training.keep=best",)
    runs = [
        identified(*files, *best, f"trainer.check_val_every_n_epoch={n}").identity for n in (1, 2)
    ]
    assert not {*keys(runs[0])} & {*keys(runs[1])}


def test_images_are_known_by_their_content(root: Path, plain: Identified, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    (moved / "val").rename(moved / "test")
    words = (*SHORT, "data=imagefolder", f"data.root={moved}", "data.val=test")
    assert keys(identified(*words).identity) == keys(plain.identity)
    Image.new("RGB", (64, 64)).save(moved / "test" / "class1" / "0.png")
    assert identified(*words).identity.digest != plain.identity.digest
    (moved / "test" / "class1" / "0.png").unlink()
    assert identified(*words).identity.digest != plain.identity.digest


def test_without_images_settings_of_images_are_no_part() -> None:
    words = ("data=none", "method=fskd")
    others = ("+data.batch_size=7", "+data.samples=4", "trainer.precision=bf16-mixed")
    assert identified(*words, *others).identity.digest == identified(*words).identity.digest


def test_a_loaded_network_is_evaluated_once(
    files: tuple[str, ...], root: Path, tmp_path: Path
) -> None:
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=3, embed_dim=64, depth=1,
        num_heads=4, class_token=False, global_pool="avg", num_classes=2,
    )  # fmt: skip
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(net.state_dict(), weights)
    shutil.copy(weights, tmp_path / "copy.safetensors")
    words = (*files, f"model.checkpoint={weights}")
    first = identified(*words).identity
    same = (
        ("seed=1",), ("data.samples=4",), ("method=oneshot",), ("model.training.lr=0.1",),
        ("trainer.limit_train_batches=2",), ("data.augmentation.re_prob=0.5", "data.batch_size=8"),
        (f"model.checkpoint={tmp_path}/copy.safetensors",),
    )  # fmt: skip
    assert {identified(*words, *more).identity.dense_key for more in same} == {first.dense_key}
    assert identified(*words, same[3][0]).identity.digest == first.digest
    other_root = shutil.copytree(root, tmp_path / "images")
    (other_root / "val" / "class0" / "0.png").unlink()
    others = (
        ("trainer.precision=bf16-mixed",), (f"data.root={other_root}",), ("model.mean=[0,0,0]",),
        ("trainer.limit_val_batches=1",), ("model.reset_head=true",),
    )  # fmt: skip
    keys = {identified(*words, *more).identity.dense_key for more in others}
    assert len(keys | {first.dense_key}) == len(others) + 1


def test_a_half_done_run_resumes_only_with_its_batches_split_as_before(
    files: tuple[str, ...], tmp_path: Path
) -> None:
    def check(*words: str) -> None:
        run = identified(*files, *words)
        check_resumable(folder, dict(run.identity.recipe), run.contents)

    folder = tmp_path
    recipe = OmegaConf.to_yaml(identified(*files).cfg, resolve=True)
    (tmp_path / "recipe.yaml").write_text(recipe)
    two = ("trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=128")
    check(*two)  # nothing is done yet
    (tmp_path / "phases" / "refit").mkdir(parents=True)
    (tmp_path / "phases" / "refit" / "manifest.json").write_text("")
    check("data.workers=7")
    with pytest.raises(ConfigError, match=r"processes \(1, now 2\).*resume it as it was started"):
        check(*two)
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches \(1, now 2\)"):
        check("+trainer.accumulate_grad_batches=2", "data.batch_size=128")


def test_a_finished_run_is_found_from_another_place(command: Command, root: Path) -> None:
    words = (
        *SHORT, "data=imagefolder", "strength=2", "model.training.epochs=1", "latency.repeats=1",
        "tracking=none", "progress=false", "data.batch_size=4", "data.workers=0",
    )  # fmt: skip
    first = command(*words, f"data.root={root}", "trainer.log_every_n_steps=1")
    assert first.code == 0, first.message
    assert json.loads(first.report.read_text())["evaluated_images"] == 6
    before = first.report.read_bytes()
    moved = shutil.copytree(root, command.out.parent / "moved")
    again = command(*words, f"data.root={moved}", "data.workers=1")
    assert again.report == first.report
    assert again.report.read_bytes() == before


def test_the_number_of_evaluated_images_is_that_of_the_part(command: Command) -> None:
    words = (*QUICK, "strength=0", "data.batch_size=100", "trainer.limit_val_batches=2")
    report = json.loads(command(*words).report.read_text())
    assert report["evaluated_images"] == 200
    assert report["limits"] == {"limit_train_batches": 2, "limit_val_batches": 2}
    report = json.loads(command("strength=0", "data=none").report.read_text())
    assert report["evaluated_images"] is None
    assert "limits" not in report


TUNED = ("method=oneshot", "method.fine_tune=true")
LONGER = ("method.tuning.recovery.training.epochs=9", "method.tuning.recovery.ema=0.5")


def test_settings_of_a_recovery_are_part_of_a_run_only_if_it_takes_place() -> None:
    default, mimicked = identified(*TUNED), identified(*TUNED, "method.tuning.objective=mimic")
    assert len({keys(found.identity) for found in (default, mimicked)}) == 2
    assert keys(identified(*TUNED, *LONGER).identity) != keys(default.identity)
    for words in (("method=oneshot",), (*TUNED, "method.tuning.objective=mimic")):
        found, longer = identified(*words), identified(*words, *LONGER)
        assert keys(found.identity) == keys(longer.identity)
        assert found.folder == longer.folder


def test_runs_from_before_there_was_a_recovery_keep_their_names() -> None:
    digests = {
        ("method=oneshot",): "1f1dbe9a",
        (*TUNED, "method.tuning.objective=mimic"): "9356477d",
        ("method=dcvit",): "dfdc6abc",
        ("method=mixed_rank",): "e2ed9c16",
        ("method=aiminify",): "ce53c89e",
    }
    assert {words: identified(*words).identity.digest for words in digests} == digests


@pytest.mark.parametrize(
    ("by_loss", "otherwise"),
    [
        (("method=oneshot", "method.scope=loss"), ("method=oneshot",)),
        (("method=mixed_rank", "method.allocation=kl"), ("method=mixed_rank",)),
    ],
)
def test_settings_of_losses_are_part_of_a_run_only_if_losses_are_predicted(
    by_loss: tuple[str, ...], otherwise: tuple[str, ...]
) -> None:
    for words, are_part in ((by_loss, True), (otherwise, False)):
        one, other = (
            identified("data=none", *words, f"method.losses.temperature={t}").identity.digest
            for t in (2, 4)
        )
        assert (one != other) == are_part

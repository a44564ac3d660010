"""Sets of images of Hugging Face's datasets, made here and read by the library itself."""

from __future__ import annotations

import copy
import io
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from command import EVERY_IMAGE, QUICK, Command
from stopping import resumed
from vitrim.cli.compose import CONF
from vitrim.data import ImageSpec
from vitrim.data.content import content
from vitrim.data.few_shot import FewShotSubset
from vitrim.data.huggingface import huggingface_set
from vitrim.data.image_files import ImageFiles
from vitrim.errors import ConfigError, MissingPackage

SPEC = ImageSpec(
    channels=3,
    size=(16, 16),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    crop_pct=1.0,
)
NAMES = ["cat", "dog"]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no test write to the cache of the user, and show no progress."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


def png(shade: int, size: tuple[int, int] = (20, 24)) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 90, 255 - shade)).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def table(number: int, *, first: int = 0, **changes: list[Any]) -> datasets.Dataset:
    """Return images of two classes by turns, each of a colour of its own."""
    columns: dict[str, list[Any]] = {
        "image": [png(10 * (first + index)) for index in range(number)],
        "label": [index % 2 for index in range(number)],
    }
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=NAMES))
    for key in changes:
        del features["label" if key == "label" else key]
    found = datasets.Dataset.from_dict({**columns, **changes})
    return found.cast(datasets.Features({**found.features, **features}))


def tables(**changes: Any) -> datasets.DatasetDict:
    return datasets.DatasetDict(train=table(8), validation=table(4, first=8), **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sets") / "saved"
    tables().save_to_disk(root)
    return root


@cache
def defaults() -> dict[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=["data=huggingface", "data.root=x"])
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    assert settings["data"].pop("_target_") == f"{huggingface_set.__module__}.huggingface_set"
    return {**settings["data"], "workers": 0, "batch_size": 4}


def opened(root: Path | str, **changes: Any) -> ImageFiles:
    return huggingface_set(**{**defaults(), "root": str(root), **changes})


def plain(images: ImageFiles) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [*images.module(SPEC).val_dataloader()]
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))  # type: ignore[return-value]


def test_a_saved_set_is_read(saved: Path) -> None:
    images = opened(saved)
    assert images.classes == ("cat", "dog")
    assert (len(images.train), len(images.val)) == (8, 4)  # type: ignore[arg-type]
    pixels, labels = plain(images)
    assert labels.tolist() == [0, 1, 0, 1]
    red = [round(float(127.5 * (1 + image[0].mean()))) for image in pixels]
    assert red == [80, 90, 100, 110]
    loaders = images.module(SPEC)
    (batch, *_) = loaders.train_dataloader()
    batch = loaders.on_after_batch_transfer(batch, 0)
    assert batch[0].shape == (4, 3, 16, 16)


def test_the_same_images_from_other_files_are_the_same_set(saved: Path, tmp_path: Path) -> None:
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    for split, rows in tables().items():
        rows.to_parquet(parquet / f"{split}.parquet")
    moved = shutil.copytree(saved, tmp_path / "moved")
    first = opened(saved)
    for root in (parquet, moved):
        other = opened(root)
        assert torch.equal(plain(other)[0], plain(first)[0])
        assert content(other) == content(first)
    whole = tables()
    datasets.concatenate_datasets([whole["train"], whole["validation"]]).to_parquet(
        tmp_path / "all.parquet"
    )
    parts = {"train": "train[:8]", "val": "train[8:]"}
    assert content(opened(tmp_path / "all.parquet", **parts)) == content(first)
    other = opened(saved, val="train")
    assert content(other) != content(first)


def test_a_folder_of_images_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    for split, number in (("train", 2), ("validation", 1)):
        for name in NAMES:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (16, 16), (50 * index, 9, 9)).save(folder / f"{index}.png")
    images = opened(tmp_path)
    assert images.classes == ("cat", "dog")
    assert plain(images)[1].tolist() == [0, 1]
    (tmp_path / "validation" / "cat" / "0.png").unlink()
    assert set(images.val.bad_images()) == set()
    with pytest.raises(Exception, match=r"val/0000000: FileNotFoundError"):
        plain(images)


@pytest.mark.parametrize("labels", [["b", "a"] * 4, [3, 1] * 4])
def test_labels_may_be_names_or_numbers(tmp_path: Path, labels: list[Any]) -> None:
    whole = datasets.DatasetDict(
        train=table(8, label=labels), validation=table(4, label=labels[:4])
    )
    whole.save_to_disk(tmp_path)
    images = opened(tmp_path)
    named = isinstance(labels[0], str)
    assert images.classes == (("a", "b") if named else ("0", "1", "2", "3"))
    assert plain(images)[1].tolist() == ([1, 0, 1, 0] if named else [3, 1, 3, 1])


@pytest.mark.parametrize("as_path", [False, True])
def test_columns_of_bytes_and_of_paths_are_read(tmp_path: Path, as_path: bool) -> None:
    files = [png(30 * index)["bytes"] for index in range(4)]
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)
    part = table(4).rename_column("label", "kind")
    part = part.add_column("picture", [*map(str, paths)] if as_path else files)
    datasets.DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "saved")
    images = opened(tmp_path / "saved", label_key="kind", image_key="picture")
    assert images.val[3][0].getpixel((0, 0)) == (90, 90, 165)


def test_few_are_drawn_by_class_and_seed(saved: Path) -> None:
    images = opened(saved, samples=4)
    assert isinstance(images.train, FewShotSubset)
    labels = [images.train[index][1] for index in range(4)]
    assert sorted(labels) == [0, 0, 1, 1]
    assert images.sample_names == opened(saved, samples=4).sample_names
    others = {tuple(opened(saved, samples=4, samples_seed=s).sample_names) for s in range(4)}
    assert len(others) > 1
    assert all(name.startswith("train/000000") for name in images.sample_names)


def test_bad_images_are_replaced_in_training_and_named_in_evaluation(tmp_path: Path) -> None:
    whole = tables()
    for split in whole:
        rows = whole[split].cast_column("image", datasets.Image(decode=False)).to_list()
        rows[1]["image"] = {"bytes": b"no image", "path": None}
        rows[2]["image"] = None
        features = whole[split].features
        whole[split] = datasets.Dataset.from_list(rows, features=features)
    whole.save_to_disk(tmp_path)
    with pytest.raises(Exception, match=r"bad_images\.limit: 2 of the 8 training images"):
        [
            *opened(tmp_path, bad_images={"limit": 1, "evaluation": "fail"})
            .module(SPEC)
            .calibration_dataloader(8, 0)
        ]
    images = opened(tmp_path, bad_images={"limit": 2, "evaluation": "skip"})
    loaders = images.module(SPEC)
    seen = [labels for _, labels in loaders.calibration_dataloader(8, 0)]
    assert torch.cat(seen).tolist() == [0, 1] * 4
    assert plain(images)[1].tolist() == [0, 1]
    reasons = images.bad_images()
    assert [*reasons["training"]] == ["train/0000001", "train/0000002"]
    assert [*reasons["evaluation"]] == ["val/0000001", "val/0000002"]
    assert "a row without an image" in reasons["evaluation"]["val/0000002"]
    with pytest.raises(Exception, match="2 of the 4 images to evaluate on cannot be used"):
        plain(opened(tmp_path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": "trian"}, ["data.train=trian", "train (8 images), validation (4 images)"]),
        ({"val": "validation[9:]"}, ["data.val=validation[9:]", "has no images"]),
        ({"val": None}, ["data.val=null"]),
        ({"image_key": "picture"}, ["data.image_key=picture", "columns image, label"]),
        ({"image_key": "label"}, ["data.image_key=label", "expected images"]),
        ({"label_key": "kind"}, ["data.label_key=kind", "columns image, label"]),
        ({"label_key": "image"}, ["data.label_key=image", "expected numbers or names"]),
        ({"subset": "large"}, ["data.subset=large", "save_to_disk", "data.subset=null"]),
        ({"samples": 9}, ["data.samples=9", "only 8"]),
        ({"train": None, "samples": 4}, ["data.samples=4", "data.train=null"]),
        ({"exif_orientation": 3}, ["data.exif_orientation=3"]),
    ],
)
def test_what_cannot_be_is_named(saved: Path, changes: Any, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(saved, **changes)
    for word in expected:
        assert word in str(caught.value)


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    whole = datasets.DatasetDict(train=table(4), validation=table(4, label=[0, -1, 1, -1]))
    whole.save_to_disk(tmp_path / "hidden")
    missing = datasets.DatasetDict(train=table(4), validation=table(4, label=[0, None, 1, 1]))
    missing.save_to_disk(tmp_path / "missing")
    for name, number in (("hidden", 2), ("missing", 1)):
        with pytest.raises(ConfigError, match=rf"data.val: {number} of 4 images have no"):
            opened(tmp_path / name)


def test_a_set_without_training_images_is_for_evaluation(saved: Path) -> None:
    images = opened(saved, train=None)
    assert not images.trainable
    assert len(images.val) == 4


def test_the_hub_is_not_asked_unless_downloads_are_allowed(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command("model=vit_tiny", "data=huggingface", "data.root=somebody/pets")
    assert done.code == 1
    for word in ("data.root=somebody/pets", "nor downloaded before", "data.download=true"):
        assert word in done.message
    assert not list(command.out.rglob("recipe.yaml"))
    assert not datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="the hub did not give a set of that name"):
        opened("somebody/pets", download=True)


def test_the_extra_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match=r"data=huggingface: .*'vitrim\[huggingface\]'"):
        opened(saved)


def test_workers_and_other_processes_read_the_same(saved: Path) -> None:
    images = opened(saved, workers=1)
    again = pickle.loads(pickle.dumps(images.val.dataset))
    assert again[1][1] == 1
    assert again[1][0].tobytes() == images.val[1][0].tobytes()
    assert torch.equal(plain(images)[0], plain(opened(saved))[0])
    turned = copy.copy(images.val.dataset)
    turned.as_pixels = True
    assert turned[0][0].shape == (3, 24, 20)


@pytest.mark.slow  # that of test_webdataset goes through the same code
def test_a_stopped_run_resumes_to_the_same_bits(
    command: Command, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "data=huggingface", f"data.root={saved}", "data.batch_size=4", "data.workers=0",
        "model=vit_digits", "model.args.in_chans=3", "model.num_classes=2", "model.args.depth=1",
        "method=fskd", "target.macs=0.7", *QUICK, EVERY_IMAGE, "model.training.epochs=2",
    ]  # fmt: skip
    assert json.loads(resumed(command, words, monkeypatch).read_text())["classes"] == NAMES

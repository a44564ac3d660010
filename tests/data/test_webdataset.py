"""Shards of webdataset, written by the library itself and read at any place."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import braceexpand
import pytest
import torch
import webdataset
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from webdataset import tariterators

from command import EVERY_IMAGE, QUICK, Command
from stopping import resumed
from vitrim.cli.compose import CONF
from vitrim.data import ImageSpec, listing, shards
from vitrim.data.content import content
from vitrim.data.few_shot import FewShotSubset
from vitrim.data.image_files import ImageFiles
from vitrim.data.webdataset import webdataset_shards
from vitrim.errors import ConfigError

SPEC = ImageSpec(
    channels=3,
    size=(16, 16),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    crop_pct=1.0,
)


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 24), (shade, 90, 255 - shade)).save(file, "png")
    return file.getvalue()


def write(root: Path, *, train: int = 8, val: int = 4) -> Path:
    """Write shards of three images of two classes by turns, each of a colour of its own."""
    root.mkdir(exist_ok=True)
    for split, number, base in (("train", train, 0), ("val", val, 8)):
        with webdataset.ShardWriter(f"{root}/{split}-%03d.tar", maxcount=3, verbose=0) as sink:
            for index in range(number):
                key = f"n{index % 2}/{index:05}"
                sink.write({"__key__": key, "png": png(10 * (base + index)), "cls": index % 2})
    return root


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sets") / "shards")


@cache
def defaults() -> Mapping[str, Any]:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=["data=webdataset", "data.root=x"])
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    assert settings["data"].pop("_target_") == f"{webdataset_shards.__module__}.webdataset_shards"
    return {**settings["data"], "workers": 0, "batch_size": 4}


def opened(root: Path, **changes: Any) -> ImageFiles:
    return webdataset_shards(**{**defaults(), "root": str(root), **changes})


def plain(images: ImageFiles) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [*images.module(SPEC).val_dataloader()]
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))  # type: ignore[return-value]


def by_webdataset(path: str) -> list[dict[str, Any]]:
    with Path(path).open("rb") as stream:  # WebDataset leaves its files open
        members = tariterators.tar_file_iterator(stream)
        return [*tariterators.group_by_keys({**member, "__url__": path} for member in members)]


def test_they_are_read_as_webdataset_reads_them(root: Path) -> None:
    images = opened(root)
    assert images.classes == ("0", "1")
    files = sorted(map(str, root.glob("train-*.tar")))
    assert len(files) == 3
    theirs = [sample for file in files for sample in by_webdataset(file)]
    dataset = images.train.dataset  # type: ignore[union-attr]
    assert [dataset.files[index] for index in range(8)] == [sample["png"] for sample in theirs]
    assert [*dataset.targets] == [int(sample["cls"]) for sample in theirs]
    assert images.train.names == [  # type: ignore[union-attr]
        f"{sample['__url__']}/{sample['__key__']}.png" for sample in theirs
    ]
    pixels, labels = plain(images)
    assert labels.tolist() == [0, 1, 0, 1]
    assert [round(float(127.5 * (1 + image[0].mean()))) for image in pixels] == [80, 90, 100, 110]


@pytest.mark.parametrize(
    "pattern", ["{a,b}-{08..11}.tar", "x-{0..3}.tar", "{000..002}", "plain.tar"]
)
def test_braces_are_those_of_webdataset(pattern: str) -> None:
    assert [*shards._braces(pattern)] == [*braceexpand.braceexpand(pattern)]


def test_patterns_name_the_same_shards(root: Path) -> None:
    found = {
        pattern: shards.expanded(root, "train", pattern)
        for pattern in ("train-*.tar", "train-{000..002}.tar", "tr*-{002,000,001}.tar")
    }
    assert len({tuple(paths) for paths in found.values()}) == 1


def test_the_order_of_images_depends_on_seed_and_epoch_alone(root: Path) -> None:
    loaders = opened(root, mixing={"mixup_alpha": 0, "cutmix_alpha": 0, "label_smoothing": 0})
    orders = []
    for workers in (0, 1):
        loader = opened(root, workers=workers).module(SPEC).train_dataloader()
        loader.batches.set_epoch(3)  # type: ignore[attr-defined]
        orders.append([batch[0]["pixels"] for batch in loader])
    assert all(map(torch.equal, *orders))
    loader = loaders.module(SPEC).train_dataloader()
    loader.load_state_dict({"epoch": 3, "given": 1})  # type: ignore[attr-defined]
    (last,) = loader
    assert torch.equal(last[0]["pixels"], orders[0][1])


def test_each_process_gets_its_share(root: Path) -> None:
    dataset = opened(root).val.dataset
    again = pickle.loads(pickle.dumps(dataset))
    assert [label for _, label in map(again.__getitem__, range(4))] == [0, 1, 0, 1]
    parts = []
    for rank in (0, 1):
        loaders = opened(root).module(SPEC)
        loaders.trainer = type("", (), {"global_rank": rank, "world_size": 2, "training": False})()
        parts.append(torch.cat([labels for _, labels in loaders.val_dataloader()]).tolist())
    assert parts == [[0, 0], [1, 1]]


def test_few_are_drawn_by_class_and_seed_wherever_they_are(root: Path, tmp_path: Path) -> None:
    images = opened(root, samples=4)
    assert isinstance(images.train, FewShotSubset)
    assert sorted(images.train[index][1] for index in range(4)) == [0, 0, 1, 1]
    moved = shutil.copytree(root, tmp_path / "moved")
    assert opened(moved, samples=4).sample_names == images.sample_names
    others = {tuple(opened(root, samples=4, samples_seed=s).sample_names) for s in range(4)}
    assert len(others) > 1


def test_images_are_known_by_their_content(root: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(root, tmp_path / "moved")
    assert content(opened(moved)) == content(opened(root))
    shutil.rmtree(moved)
    write(moved, train=9)
    changed, first = content(opened(moved)), content(opened(root))
    assert changed is not None
    assert first is not None
    assert changed["training"] != first["training"]
    assert changed["evaluation"] == first["evaluation"]


def test_classes_have_the_names_of_a_file(root: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    assert opened(root, class_names=str(names)).classes == ("cat", "dog")
    for text, expected in (("cat\n", "1 names, and labels up to 1"), ("a\na\n", "not 'a'")):
        names.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            opened(root, class_names=str(names))
    with pytest.raises(ConfigError, match=r"data\.class_names=nowhere\.txt: no such file"):
        opened(root, class_names="nowhere.txt")


def test_bad_images_are_replaced_in_training_and_named_in_evaluation(tmp_path: Path) -> None:
    write(tmp_path, val=2)
    for split in ("train", "val"):
        shard = tmp_path / f"{split}-000.tar"
        write_tar(shard, [("0.jpg", png(9)), ("0.cls", b"0"), ("1.jpg", b"no"), ("1.cls", b"0")])
    images = opened(tmp_path, bad_images={"limit": 1, "evaluation": "skip"})
    loaders = images.module(SPEC)
    assert sum(len(labels) for _, labels in loaders.calibration_dataloader(9, 0)) == 7
    assert plain(images)[1].tolist() == [0]
    reasons = images.bad_images()
    assert [*reasons["training"]] == [f"{tmp_path}/train-000.tar/1.jpg"]
    assert [*reasons["evaluation"]] == [f"{tmp_path}/val-000.tar/1.jpg"]
    with pytest.raises(Exception, match="1 of the 2 images to evaluate on cannot be used"):
        plain(opened(tmp_path))


ONE = (("0.jpg", b"x"), ("0.cls", b"0"))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("0.jpg", b"x"), ("1.cls", b"0")], ["sample 0 has jpg and no cls", "data.label_key"]),
        ([*ONE, ("1.jpg", b"x")], ["sample 1 has jpg and no cls"]),
        ([*ONE, ("1.jpg", b"x"), ("1.cls", b"1"), *ONE], ["sample 0 is there twice"]),
        ([("0.jpg", b"x"), ("0.JPG", b"y"), ("0.cls", b"0")], ["0.JPG is there twice"]),
        ([("0.jpg", b"x"), ("0.cls", b"cat")], ["label 0.cls is b'cat'", "from 0 on"]),
        ([("0.jpg", b"x"), ("0.cls", b"-1")], ["label 0.cls is b'-1'"]),
        ([("0.gif", b"x"), ("0.cls", b"1")], ["no sample with a member jpg or", "data.image_keys"]),
        ([], ["no sample with a member jpg or"]),
    ],
)
def test_what_is_wrong_in_a_shard_is_named(
    root: Path, tmp_path: Path, members: list[tuple[str, bytes]], expected: list[str]
) -> None:
    path = tmp_path / "train-000.tar"
    write_tar(path, members)
    shutil.copy(root / "val-000.tar", tmp_path)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path)
    for words in (str(path), *expected):
        assert words in str(caught.value)


def damaged(whole: bytes) -> dict[str, tuple[bytes, str]]:
    header = bytearray(whole)
    header[2 * 512] ^= 1  # the name of the second member, which its checksum does not fit
    return {
        "within a member": (whole[:700], "damaged or truncated"),
        "between two members": (whole[: 512 * 4], "damaged or truncated"),
        "within a header": (whole[: 512 * 4 + 100], "damaged or truncated"),
        "a header": (bytes(header), "damaged or truncated"),
        "compressed": (gzip.compress(whole), "decompress it"),
        "empty": (b"", "damaged or truncated"),
        "text": (b"version https://git-lfs.github.com/spec/v1\n" * 30, "no tar file"),
    }


@pytest.mark.parametrize("kind", [*damaged(bytes(9000))])
def test_damaged_shards_are_named_before_anything_else(
    root: Path, tmp_path: Path, kind: str
) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "train-001.tar"
    data, expected = damaged(path.read_bytes())[kind]
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=expected) as caught:
        opened(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": "train-{000..003}.tar"}, ["no file", "train-003.tar", "train-000.tar"]),
        ({"train": "trian-*.tar"}, ["data.train=trian-*.tar", "there are train-000.tar"]),
        ({"train": "train-*.tar", "val": "{val,val}-000.tar"}, ["more than once"]),
        ({"train": "pipe:cat x"}, ["below data.root"]),
        ({"train": "http://x/y.tar"}, ["below data.root"]),
        ({"train": "/tmp/y.tar"}, ["below data.root"]),
        ({"val": None}, ["data.val=null"]),
        ({"label_key": ""}, ["data.label_key=: expected extensions"]),
        ({"image_keys": "jpg"}, ["data.image_keys=jpg"]),
        ({"train": None, "samples": 4}, ["data.samples=4", "data.train=null"]),
    ],
)
def test_what_cannot_be_is_named(root: Path, changes: Any, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(root, **changes)
    for words in expected:
        assert words in str(caught.value)


def test_a_list_is_kept_and_made_again_when_a_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "KEPT_FROM", 4)
    root = write(tmp_path / "shards")
    for path in root.iterdir():
        os.utime(path, (1e9, 1e9))
    first = opened(root)
    kept = listing.cache_folder()
    assert kept is not None
    assert len([*kept.glob("shards-*.npz")]) == 2
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_listed", None)
        again = opened(root)
    assert again.train.names == first.train.names  # type: ignore[union-attr]
    assert torch.equal(plain(again)[0], plain(first)[0])
    for path in kept.glob("shards-*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    assert content(opened(root)) == content(first)
    write_tar(root / "val-000.tar", [("0.png", png(1)), ("0.cls", b"1")])
    assert len(opened(root).val) == 2
    with Path(root / "val-001.tar").open("r+b") as file:
        file.truncate(600)
    with pytest.raises(ConfigError, match=r"val-001\.tar"):
        opened(root)
    with pytest.raises(Exception, match=r"val-001\.tar ends within this image"):
        plain(first)


def test_a_stopped_run_resumes_to_the_same_bits(
    command: Command, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "data=webdataset", f"data.root={root}", "data.batch_size=4", "data.workers=0",
        "data.train='train-{000..002}.tar'",
        "model=vit_digits", "model.args.in_chans=3", "model.num_classes=2", "model.args.depth=1",
        "method=fskd", "target.macs=0.7", *QUICK, EVERY_IMAGE, "model.training.epochs=2",
    ]  # fmt: skip
    assert json.loads(resumed(command, words, monkeypatch).read_text())["classes"] == ["0", "1"]

"""Images a second of one core for training: against timm on PIL images, and timm's own loader.

On made JPEGs of 500 x 375 pixels (smooth random images), and on the same ones resized once to 256
pixels at the short side. What the network's device does after the transfer is timed on its own.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.auto_augment import posterize

from vitrim.data import ImageSpec, Loaders, sample_indices
from vitrim.data.image_files import _operations, _posterize
from vitrim.data.imagefolder import image_folder
from vitrim.data.webdataset import webdataset_shards

from .timing import Row, Side, take_turns

IMAGES, BATCH, FEW = 96, 32, 48
SPEC = ImageSpec(
    channels=3,
    size=(224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation="bicubic",
    crop_pct=0.9,
)
RECIPE: dict[str, Any] = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.3,
    "re_prob": 0.25,
    "re_mode": "pixel",
}
"""DeiT's."""
OFF = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0}


def rows(repeats: int) -> list[Row]:
    """Return the comparisons of an epoch."""
    with tempfile.TemporaryDirectory() as name:
        whole, short = Path(name) / "whole", Path(name) / "short"
        _make(whole, short)
        pil, tensor, prepared = (
            _loaders(root, backend)
            for root, backend in ((whole, "pil"), (whole, "tensor"), (short, "tensor"))
        )
        shards = _of_shards(whole)
        few = _loaders(whole, "pil", samples=FEW)
        again, of_all = (loaders.calibration_dataloader(FEW, 0) for loaders in (few, pil))
        assert len([*again]) == len([*of_all]) == -(-FEW // BATCH)
        by_timm = _of_timm(whole)
        drawn = [*tensor.train_dataloader()]
        sides = {
            "pil": _epoch(pil.train_dataloader()),
            "tensor": _epoch(tensor.train_dataloader()),
            "prepared": _epoch(prepared.train_dataloader()),
            "timm": _epoch(by_timm),
            "few": _epoch(again),
            "few before": _epoch(_Before(few)),
            "of all": _epoch(of_all),
            "of all before": _epoch(_Before(pil)),
            "shards": _epoch(shards.train_dataloader()),
            "after": Side(work=lambda _: [_finished(tensor, batch) for batch in drawn]),
        }
        seconds = take_turns(sides, max(3, repeats))
    for side in ("pil", "timm", "tensor", "prepared", "after"):
        print(f"{side}: {IMAGES / min(seconds[side]):,.0f} images/s (best turn)")
    today = "timm's augmentation on PIL images (backend=pil)"
    return [
        _row("tensors, 500 x 375", today, seconds["tensor"], seconds["pil"], 2.3),
        _row("tensors, 256 at the short side", today, seconds["prepared"], seconds["pil"], 3.5),
        _row("tensors, 500 x 375", "timm's loader", seconds["tensor"], seconds["timm"], 2.0),
        _row(
            f"{FEW} plain images after the first epoch",
            "decoded before, prepared again",
            seconds["few"],
            seconds["few before"],
            8.0,
        ),
        _row(
            f"{FEW} plain images of all after the first epoch",
            "decoded and prepared again",
            seconds["of all"],
            seconds["of all before"],
            8.0,
        ),
        Row(
            name="tensors, 500 x 375, from shards",
            peer="from folders",
            ours_s=seconds["shards"],
            peer_s=seconds["tensor"],
            kind="cost",
            limit=1.1,
        ),
        Row(
            name="what is left to the device, on this core",
            peer="all of an epoch of tensors before it",
            ours_s=seconds["after"],
            peer_s=seconds["tensor"],
            kind="cost",
        ),
    ]


def _row(name: str, peer: str, ours: list[float], theirs: list[float], limit: float) -> Row:
    return Row(name=name, peer=peer, ours_s=ours, peer_s=theirs, kind="faster", limit=limit)


@dataclass(frozen=True)
class _Before:
    """Plain images that are prepared in every epoch, as before they were kept.

    Those of a few-shot set are decoded, others are decoded again.
    """

    loaders: Loaders

    def __iter__(self) -> Any:
        plain = self.loaders.calibration_set  # type: ignore[attr-defined]
        examples = [plain[index] for index in sample_indices(len(plain), FEW, 0)]
        for begin in range(0, len(examples), BATCH):
            yield torch.stack([image for image, _ in examples[begin : begin + BATCH]])


def _epoch(batches: Iterable[object]) -> Side:
    def work(_: object) -> None:
        for _batch in batches:
            pass

    return Side(work=work)


def _finished(loaders: Loaders, batch: Any) -> object:
    drawn, labels = batch
    again = {**drawn, "pixels": drawn["pixels"].clone()}
    return loaders.on_after_batch_transfer((again, labels), 0)


def _loaders(root: Path, backend: str, samples: int | None = None) -> Loaders:
    images = image_folder(
        root=str(root), train="train", val="train", classes=None, class_seed=0, samples=samples,
        samples_seed=0, batch_size=BATCH, workers=0, mixing=OFF,
        bad_images={"limit": 0, "evaluation": "fail"}, augmentation={**RECIPE, "backend": backend},
    )  # fmt: skip
    return images.module(SPEC)


def _of_shards(root: Path) -> Loaders:
    """Return loaders of the same files in two tars."""
    folder = root.with_name("shards")
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"train-{number}.tar", "w") as tar:
            for path in sorted((root / "train").glob("*/*.jpg"))[number::2]:
                label = b"%d" % (path.parent.name == "b")
                for kind, content in (("jpg", path.read_bytes()), ("cls", label)):
                    member = tarfile.TarInfo(f"{path.stem}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    images = webdataset_shards(
        root=str(folder), train="train-*.tar", val="train-0.tar", image_keys=["jpg"],
        label_key="cls", class_names=None, samples=None, samples_seed=0, batch_size=BATCH,
        workers=0, mixing=OFF, bad_images={"limit": 0, "evaluation": "fail"},
        augmentation={**RECIPE, "backend": "tensor"},
    )  # fmt: skip
    return images.module(SPEC)


def _of_timm(root: Path) -> Iterable[object]:
    """Return timm's loader of uint8 batches, without what it leaves to the device."""
    loader = create_loader(
        create_dataset("", root=str(root / "train")),
        input_size=(3, 224, 224),
        batch_size=BATCH,
        is_training=True,
        interpolation=SPEC.interpolation,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
        pin_memory=False,
        **{key: RECIPE[key] for key in RECIPE},
    )
    inner: Any = loader.loader
    for operation in _operations(inner.dataset.transform):  # Pillow refuses to keep no bits
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return cast(Iterable[object], inner)


def _make(whole: Path, short: Path) -> None:
    """Write smooth images of two classes, and the same ones resized."""
    generator = torch.Generator().manual_seed(0)
    for index in range(IMAGES):
        noise = torch.rand(1, 3, 24, 32, generator=generator)
        pixels = F.interpolate(noise, (375, 500), mode="bicubic")[0]
        array = pixels.clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(array)
        for root, picture in ((whole, image), (short, image.resize((341, 256), Image.BICUBIC))):
            folder = root / "train" / "ab"[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{index}.jpg", quality=90)

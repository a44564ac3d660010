"""`vitrim.compress`: a network at hand and some images in, the compact network out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vitrim.api.quiet import trainers, undisturbed
from vitrim.api.request import Options, Request, latency_settings, request
from vitrim.budget.target import METRICS
from vitrim.files import digest, write
from vitrim.measure import LatencySettings
from vitrim.method import Method
from vitrim.model.identify import at_path, identify
from vitrim.pipeline import Identity, Job, run
from vitrim.plan import Plan
from vitrim.store import load, save
from vitrim.versions import versions


class Compressed(NamedTuple):
    """A compact network, the plan that leads to it, and the report: counts, latency, accuracy."""

    net: nn.Module
    plan: Plan
    report: Mapping[str, Any]

    def __repr__(self) -> str:
        """Name the network, and what is kept of it."""
        kept = ", ".join(
            f"{share:.1%} of the {what}" for what, share in self.report["kept"].items()
        )
        return f"Compressed({self.plan!r}: {kept})"

    def save(self, folder: str | Path) -> Path:
        """Write the network, its plan and its report, for `vitrim.load`; return the folder.

        Raises:
            StoreError: the network was changed, and `vitrim.load` would return another one.
        """
        folder = save(folder, self.net, self.plan)
        text = json.dumps(self.report, indent=1, sort_keys=True)
        write(folder / "report.json", lambda path: path.write_text(text))
        return folder


def compress(
    net: nn.Module,
    images: object,
    method: str | Method = "joint",
    *,
    strength: float | None = None,
    n_images: int | None = None,
    train: object = None,
    validation: object = None,
    backbone: str | None = None,
    network: Mapping[str, object] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: object,
) -> Compressed:
    """Compress a network of timm with a few images.

    The network is not modified. The result is the command's with the same images, batch size and
    seed; the order in which a DataLoader gives its images does not matter.

    Args:
        net: the network with its weights, compiled or not, on any device, in any float type; the
            work is done in float32, and the result, in eval mode, has the device and type of `net`.
        images: unlabelled, (N, C, H, W) in float, normalised as `net` expects them: a tensor, a
            DataLoader, a data set, or an iterable of tensors, (images, labels), or dicts with
            pixel_values.
        method: name of a file in conf/method/, or a method itself.
        strength: 0 (nothing is removed) to 5, in place of a budget.
        n_images: how many of the images are used; None: as many as the method asks for, or all.
        train: batches with labels, a DataLoader say, for methods that train with labels (vtp).
        validation: labelled images, on which the networks are evaluated; None: nothing is.
        backbone: module path of the network of timm inside `net`.
        network: `name` and `args` of timm.create_model for `net`; None: they are found.
        batch_size: of the passes over `images`; None: the command's.
        seed: of everything that is random.
        progress: whether a progress bar is shown, in a terminal or notebook.
        **settings: a budget: macs, params, latency or units, a fraction or a number; size_mb or
            latency_ms, a number; blocks, to be removed. And keys of the method's yaml with their
            values, nested keys as mappings.

    Raises:
        VitrimError: what cannot work, in one sentence, before any of the work is done.
    """
    budget: dict[str, object] = {name: settings.pop(name) for name in METRICS if name in settings}
    found = identify(at_path(net, backbone), network)
    options = Options(
        method=method,
        strength=strength,
        budget=budget,
        settings=settings,
        n_images=n_images,
        batch_size=batch_size,
        seed=seed,
    )
    with undisturbed():
        asked = request(found, options, images, train=train, validation=validation)
        with tempfile.TemporaryDirectory(prefix="vitrim-") as folder:
            compressed = _run(asked, Path(folder), progress=progress)
    return compressed._replace(net=compressed.net.to(found.device, found.dtype))


def _run(asked: Request, out: Path, *, progress: bool) -> Compressed:
    """Run the pipeline below `out` and return what it saved there."""
    device = asked.found.device
    on_gpu = device.type == "cuda"
    folder = out / "run"
    folder.mkdir()
    latency = latency_settings()
    del latency["table"]
    evaluates = asked.data.validation is not None
    with trainers(
        accelerator="gpu" if on_gpu else "cpu",
        devices=[device.index or 0] if on_gpu else 1,
        progress=progress,
        evaluates=evaluates,
    ) as trainer:
        job = Job(
            model=asked.model,
            method=asked.method,
            target=asked.target,
            data=asked.data,
            trainer=trainer,
            out=out,
            start=None,
            latency=LatencySettings(**{**latency, "device": "cuda" if on_gpu else "cpu"}),
            latency_table=asked.latency_table(out, on_gpu=on_gpu),
            quantize=(),
            seed=asked.options.seed,
            tracking="none",
            progress=False,
            checkpoint_minutes=None,
            batchnorm_images=asked.data.needed,
            evaluates=evaluates,
        )
        report = run(job, _identity(asked), folder)
    net, plan = load(folder)
    weights = {**report["weights"], "source": "given"}  # type: ignore[dict-item]
    return Compressed(net, plan, {**report, "weights": weights})


def _identity(asked: Request) -> Identity:
    """Return the identity of a run whose folder is removed at its end."""
    options, data = asked.options, asked.data
    recipe: dict[str, object] = {
        "method": {**asked.settings, "name": asked.name},
        "model": asked.model.description(),
        "target": {target.metric: target.keep for target in asked.target.all},
        "seed": options.seed,
        "images": data.needed,
        "batch_size": data.batch_size,
    }
    key = digest(recipe)
    model, images = str(asked.model.name), len(data.images)
    return Identity(
        method=asked.name,
        strength=options.strength,
        recipe=recipe,
        digest=key,
        dense_key="given",
        start_key="given",
        series=f"{model}-own-{asked.name}",
        name=key,
        facts={
            "choices": {"model": model, "method": asked.name, "data": "own", "experiment": None},
            "strength": options.strength,
            "seed": options.seed,
            "samples": data.needed,
            "dataset": {"name": "own", "classes": data.n_classes, "training_images": images},
            "overrides": [],
            "recipe_hash": key,
            "series": f"{model}-own-{asked.name}",
            "variant": "",
            **versions(),
        },
    )

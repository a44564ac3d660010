"""Artefacts and configurations of an attacker: none runs, each ends in one clear message."""

from __future__ import annotations

import json
import pickle
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash

from command import Command
from nets import MODEL, TINY, plan_of, small_net
from vitrim import Plan, cut, save
from vitrim.files import MANIFEST, PLAN, WEIGHTS, write_manifest
from vitrim.plan import dumps

QUICKLY_S = 30  # seconds, on a busy machine; bombs took minutes or all memory
DRY = ("data=none", "strength=0", "latency.repeats=1", "tracking=none")
KEPT = plan_of({"blocks.0.mlp.hidden": (0, 1)})
CANARY = "canary"


class Payload:
    """A pickle that leaves a trace when it is run."""

    def __init__(self, folder: Path) -> None:
        self.trace = folder / CANARY

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.trace,)


def saved(folder: Path) -> Path:
    return save(folder / "run", cut(small_net(dtype=torch.float32), KEPT), KEPT)


def tampered(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], list[str]]:
    """Return what saves a network, replaces a file and its checksums, and begins with it."""

    def made(folder: Path) -> list[str]:
        run = saved(folder)
        (run / name).write_bytes(content(folder))
        write_manifest(run, (PLAN, WEIGHTS))
        return [f"from_run={run}"]

    return made


def manifest(text: Callable[[dict[str, Any]], str]) -> Callable[[Path], list[str]]:
    def made(folder: Path) -> list[str]:
        run = saved(folder)
        entries = json.loads((run / MANIFEST).read_text())
        del entries["checksum"]
        (run / MANIFEST).write_text(text(entries))
        return [f"from_run={run}"]

    return made


def signed(entries: dict[str, Any]) -> str:
    rest = json.dumps(entries, sort_keys=True)
    entries["checksum"] = xxhash.xxh3_128_hexdigest(rest.encode())
    return json.dumps(entries, indent=1, sort_keys=True)


def of_model(**args: Any) -> Callable[[Path], list[str]]:
    """Return what begins with a plan of a network with such arguments."""
    model = {**MODEL, "args": {**TINY, **args}}
    return tampered(PLAN, lambda _: dumps(Plan(model=model, edits=KEPT.edits)).encode())


def header(entries: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(shape: Sequence[int], *, size: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [0, size]}


def of_weights(content: bytes) -> Callable[[Path], list[str]]:
    return tampered(WEIGHTS, lambda _: content)


def in_float8(folder: Path) -> list[str]:
    run = saved(folder)
    state = safetensors.torch.load_file(run / WEIGHTS)
    state = {name: value.to(torch.float8_e4m3fn) for name, value in state.items()}
    safetensors.torch.save_file(state, run / WEIGHTS)
    write_manifest(run, (PLAN, WEIGHTS))
    return [f"from_run={run}"]


def checkpoint(name: str, dump: Callable[[Payload, Path], object]) -> Callable[[Path], list[str]]:
    """Return what writes a pickle and gives it as the checkpoint."""

    def made(folder: Path) -> list[str]:
        dump(Payload(folder), folder / name)
        return [f"model.checkpoint={folder / name}"]

    return made


def as_array(payload: Payload, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)


ARTEFACTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "weights are a pickle": (
        tampered(WEIGHTS, lambda folder: pickle.dumps(Payload(folder))),
        "pickle",
    ),
    "weights are an old pickle": (
        tampered(WEIGHTS, lambda folder: pickle.dumps(Payload(folder), protocol=0)),
        "not a readable safetensors file",
    ),
    "checkpoint of torch.save": (checkpoint("net.safetensors", torch.save), "pickle"),
    "checkpoint.pth": (checkpoint("net.pth", torch.save), "can run code: it was not read"),
    "checkpoint.ckpt": (checkpoint("net.ckpt", as_array), "it was not read"),
    "checkpoint.npy": (checkpoint("net.npy", as_array), "expected a .safetensors file"),
    "array of objects": (checkpoint("net.safetensors", as_array), "not a readable"),
    **{
        f"checkpoint at {address}": (
            lambda _, address=address: [f"'model.checkpoint=\"{address}\"'"[1:-1]],
            "an address",
        )
        for address in ("http://127.0.0.1:9/net.safetensors", "s3://a/b", "hf-hub:a/b")
    },
    "plan that loads": (of_model(checkpoint_path="net.pth"), "checkpoint_path"),
    "plan of another source": (of_model(pretrained_cfg={"file": "net.pth"}), "pretrained_cfg"),
    "plan with a million blocks": (of_model(depth=10**6), "1000000"),
    "plan with a wide net": (of_model(embed_dim=10**9), "1000000000"),
    "plan with a large net": (of_model(embed_dim=60_000, depth=900), "elements"),
    "plan with a function": (of_model(act_layer="os.system"), "cannot build"),
    "plan with many arguments": (of_model(depths=[[1] * 999] * 9), "at most 1000 values"),
    "plan without an end": (tampered(PLAN, lambda _: b"[" * 10**6), "not valid JSON"),
    "plan of 65 MiB": (tampered(PLAN, lambda _: b" " * (2**26 + 1)), "at most"),
    "plan beyond the units": (
        tampered(PLAN, lambda _: dumps(plan_of({"blocks.0.mlp.hidden": (0, 2**31)})).encode()),
        "blocks.0.mlp.hidden",
    ),
    "manifest with more": (manifest(lambda entries: signed({**entries, "run": "x"})), "['run']"),
    "manifest of 2 MiB": (manifest(lambda entries: signed(entries) + " " * 2**21), "at most"),
    "manifest of paths": (
        manifest(lambda entries: signed({**entries, "files": {"../../x": {}}})),
        "two checksums",
    ),
    "300,000 tensors": (
        tampered(
            WEIGHTS, lambda _: header({f"t{at}": tensor([0], size=0) for at in range(300_000)})
        ),
        "its header is larger",
    ),
    "a tensor of terabytes": (of_weights(header({"t": tensor([2**40], size=2**42)})), "readable"),
    "a shape beyond integers": (of_weights(header({"t": tensor([0, 2**64 - 1], size=0)})), WEIGHTS),
    "weights in 8 bits": (in_float8, "float8"),
}


def overlay(text: str, *arguments: str) -> Callable[[Path], list[str]]:
    """Return what writes an experiment into a config folder and chooses it."""

    def made(folder: Path) -> list[str]:
        path = folder / "conf" / "experiment" / "evil.yaml"
        path.parent.mkdir(parents=True)
        path.write_text("# @package _global_\n" + text.replace("CANARY", str(folder / CANARY)))
        return ["--config-dir", str(folder / "conf"), *(arguments or ["experiment=evil"])]

    return made


def said(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda folder: [word.replace("CANARY", str(folder / CANARY)) for word in arguments]


SYSTEM = "{_target_: os.system, command: touch CANARY}"
ALIASES = "\n".join(
    f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9) if at else 1}]" for at in range(12)
)
CONFIGS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    **{
        f"{key}={target}": (said(f"{key}={target}"), target)
        for key, target in (
            ("data._target_", "os.system"),
            ("data._target_", "vitrim.cli.app.os.system"),
            ("data._target_", "vitrim.data.imagefolder.Path"),
            ("data._target_", "torchvision.datasets.utils.download_url"),
            ("data._target_", "vitrim.data.few_shot.few_shot"),
            ("method._target_", "vitrim.store.torch.load"),
            ("method._target_", "vitrim.cli.app.main"),
            ("model._target_", "hydra.utils.get_method"),
            ("model._target_", "vitrim.model.source.Timm.build"),
            ("model._target_", "null"),
            ("trainer._target_", "lightning.LightningModule.load_from_checkpoint"),
            ("trainer._target_", "lightning.pytorch.trainer.trainer.os.system"),
            ("model.training._target_", "torch.hub.load"),
            ("model.training._target_", "torch.optim.swa_utils.torch.load"),
            ("model.training._target_", "torchvision.datasets.LSUN"),
            ("model.training._target_", "lightning.pytorch.callbacks.no_such_thing"),
        )
    },
    "called later": (
        said("+model.args.x={_target_: builtins.eval, _partial_: true, _args_: ['1']}"),
        "builtins.eval",
    ),
    "in a list": (
        said("+trainer.plugins=[{_target_: os.system, command: touch CANARY}]"),
        "os.sys",
    ),
    "through an interpolation": (
        overlay(f"evil: {SYSTEM}\nmodel:\n  training: ${{evil}}\n"),
        "model.training._target_=os.system",
    ),
    "made by an interpolation": (
        overlay("evil: system\nmodel:\n  training:\n    _target_: os.${evil}\n"),
        "model.training._target_=os.system",
    ),
    "made by a resolver": (
        overlay("model:\n  args: \"${oc.create:'" + SYSTEM + "'}\"\n"),
        "model.args._target_=os.system",
    ),
    "resolved twice": (
        overlay("model:\n  args:\n    x: \"\\\\${oc.decode:'" + SYSTEM + "'}\"\n"),
        "model.args.x=${oc.decode",
    ),
    "a tag of Python": (
        overlay("seed: !!python/object/apply:os.system ['touch CANARY']\n"),
        "python/object/apply",
    ),
    "a tag of somebody": (overlay("seed: !os.system 'touch CANARY'\n"), "!os.system"),
    "aliases of aliases": (overlay(ALIASES), "aliases written out"),
    "brackets without an end": (overlay("x: " + "[" * 100_000), "64 levels"),
    "a callback of Hydra": (
        overlay(f"hydra:\n  callbacks:\n    x: {SYSTEM}\n"),
        "hydra.callbacks=",
    ),
    "a callback in one job of a sweep": (
        overlay(f"hydra:\n  callbacks:\n    x: {SYSTEM}\n", "-m", "experiment=evil,demo"),
        "hydra.callbacks=",
    ),
    "a factory of log handlers": (
        overlay(
            "hydra:\n  job_logging:\n    handlers:\n      console: {(): os.system, command: x}"
        ),
        "job_logging.handlers.console.()=os.system",
    ),
    "a class of log handlers": (
        overlay("hydra:\n  job_logging:\n    handlers:\n      console: {class: logging.os.system}"),
        "class=logging.os.system",
    ),
    "a log elsewhere": (
        overlay(
            "hydra:\n  job_logging:\n    handlers:\n"
            "      console: {class: logging.FileHandler, filename: CANARY}"
        ),
        "job_logging.handlers.console.filename",
    ),
    "handlers from elsewhere": (
        overlay("x: {a: {class: os.system}}\nhydra:\n  job_logging:\n    handlers: ${x}"),
        "hydra.job_logging",
    ),
    "an environment": (said("+hydra.job.env_set.LD_PRELOAD=CANARY"), "hydra.job.env_set="),
    "a launcher": (
        said("-m", "hydra.launcher._target_=os.system", "+hydra.launcher.command=touch CANARY"),
        "hydra.launcher=os.system",
    ),
    "a launcher's part": (
        said("+hydra.sweep.x={_target_: os.system, command: touch CANARY}"),
        "",  # Hydra's own schema refuses it first
    ),
}


@pytest.mark.parametrize("name", [*ARTEFACTS, *CONFIGS])
def test_it_does_not_run_and_ends_in_one_clear_message(
    command: Command, tmp_path: Path, name: str
) -> None:
    made, expected = {**ARTEFACTS, **CONFIGS}[name]
    arguments = made(tmp_path)
    started = time.perf_counter()
    done = command(*arguments, *DRY)
    assert time.perf_counter() - started < QUICKLY_S
    assert done.code == 1
    assert expected in done.message
    assert "vitrim: " in done.message
    assert "Traceback" not in done.message
    assert len(done.message) < 2000
    assert not (tmp_path / CANARY).exists()
    assert not list(command.out.rglob("report.json"))


def test_the_arguments_around_them_make_a_run(command: Command, tmp_path: Path) -> None:
    assert command(*DRY).code == 0
    plain = overlay("seed: &seed 3\nlatency:\n  batch: *seed\n")
    assert command(*plain(tmp_path), *DRY).code == 0

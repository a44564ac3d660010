"""The command `vitrim`, called in this process as a user calls it in a shell."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from vitrim.cli.app import main

QUICK = (
    "model.training.epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "latency.repeats=1",
    "tracking=none",
    "progress=false",
)
"""Overrides for a run that shows that it works, not how well."""
EVERY_IMAGE = "trainer.limit_val_batches=1.0"
"""After QUICK: evaluate on all images."""


def swin(depths: str) -> tuple[str, ...]:
    """Return a Swin for the digits: maps of 8x8 and 4x4 tokens in windows of 3x3."""
    return (
        "model=swin_tiny",
        "model.num_classes=10",
        "model.image_size=8",
        "+model.args.in_chans=1",
        "+model.args.patch_size=1",
        "+model.args.window_size=3",
        "+model.args.embed_dim=12",
        f"+model.args.depths={depths}",
        "+model.args.num_heads=[2,3]",
    )


@contextlib.contextmanager
def same_handlers() -> Iterator[None]:
    """Give the root logger its handlers back: Hydra's own would write to what a test captured."""
    root = logging.getLogger()
    handlers, level = [*root.handlers], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def folder_of(*arguments: str) -> Path:
    """Run `vitrim` without the fixtures of a test and return the folder of its run."""
    printed = io.StringIO()
    GlobalHydra.instance().clear()
    with (
        same_handlers(),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
    ):
        patch.setattr(sys, "argv", ["vitrim", *arguments])
        main()
    return Path(printed.getvalue().splitlines()[-1]).parent


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a finished command leaves behind."""

    code: int
    output: str
    message: str

    @property
    def report(self) -> Path:
        """The report whose path is the last line printed."""
        return Path(self.output.splitlines()[-1])


@dataclass(frozen=True)
class Command:
    """Runs `vitrim` with its run folders below `out`."""

    out: Path
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> Done:
        """Return exit code, standard output, and standard error with the exit message."""
        where = [] if any(word.startswith("out=") for word in arguments) else [f"out={self.out}"]
        self.patch.setattr(sys, "argv", ["vitrim", *arguments, *where])
        GlobalHydra.instance().clear()
        self.capture.readouterr()
        code: object = 0
        try:
            with same_handlers():
                main()
        except SystemExit as stop:
            code = stop.code
        printed = self.capture.readouterr()
        message = printed.err + (code if isinstance(code, str) else "")
        return Done(code=code if isinstance(code, int) else 1, output=printed.out, message=message)

"""Training steps through `torch.compile`: what the networks of a phase compute becomes few kernels.

Modules are not wrapped, so that the names in their state dicts stay. Only training steps are
compiled: an evaluation rounds as it would without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from vitrim.errors import ConfigError
from vitrim.trainer.phase import Compiles

METHODS = ("forward", "forward_features")
"""Methods of a network that phases call."""


class Compiled(Callback):
    """Compile what networks compute in the training steps of a phase.

    Args:
        networks: in training, and teachers; between the steps they are as they were.
        backend: of `torch.compile`.
    """

    def __init__(
        self, networks: Sequence[nn.Module], backend: str | Callable[..., object] = "inductor"
    ) -> None:
        self._networks = networks
        self._backend = backend
        self._compiled: list[tuple[nn.Module, str, Callable[..., object]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what other phases compiled: PyTorch keeps few variants of a function."""
        torch.compiler.reset()
        self._compiled = [
            (net, name, torch.compile(getattr(net, name), backend=self._backend))
            for net in self._networks
            for name in METHODS
            if hasattr(net, name)
        ]

    def on_train_batch_start(self, *args: object, **kwargs: object) -> None:
        """Put the compiled methods in place."""
        for net, name, method in self._compiled:
            vars(net)[name] = method

    def on_train_batch_end(self, *args: object, **kwargs: object) -> None:
        """Remove them."""
        for net, name, _ in self._compiled:
            vars(net).pop(name, None)

    def on_exception(self, *args: object, **kwargs: object) -> None:
        """Remove them."""
        self.on_train_batch_end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free what was compiled."""
        self._compiled = []
        torch.compiler.reset()


def compiling(phase: object) -> list[Callback]:
    """Return what compiles the steps of a phase; empty where it takes them by itself."""
    return [Compiled(phase.networks)] if isinstance(phase, Compiles) else []


def check_compiles(device: str) -> None:
    """Compile and run a function of a few numbers on a device.

    Their number differs between calls, so that nothing compiled earlier is found on the disk.

    Raises:
        ConfigError: that does not work here.
    """
    try:
        numbers = 2 + time.time_ns() % 2**16
        torch.compile(_small)(torch.ones(numbers, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        needed = "a C++ compiler (g++)" if device == "cpu" else "Triton and a C compiler (gcc)"
        raise ConfigError(
            f"trainer.compile=true: torch.compile does not work here ({reason}): install {needed}, "
            "or set trainer.compile=false"
        ) from None
    finally:
        torch.compiler.reset()


def _small(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1

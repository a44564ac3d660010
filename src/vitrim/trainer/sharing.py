"""Networks that hold the same weights in memory once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import xxhash
from torch import Tensor, nn

from vitrim.errors import ConfigError
from vitrim.trainer.phase import Phase


@contextmanager
def shared_weights(phase: Phase, dense: nn.Module) -> Iterator[None]:
    """Let a phase that trains nothing read the weights of `dense` without a copy of its own.

    Parameters of its `net` of one name, shape, type and value are shared; the others, and buffers,
    are not. Afterwards the weights of `dense` have to be what they were. A phase that trains keeps
    its copy.

    Args:
        phase: whose `net` is a copy of `dense`, or made of one.
        dense: the network whose weights are kept.

    Raises:
        ConfigError: the phase changed weights all the same.
    """
    own = {} if phase.trains else dict(dense.named_parameters())
    shared = {}
    for name, parameter in phase.net.named_parameters():
        if name in own and _equal(own[name], parameter):
            shared[name] = own[name]
            parameter.data = own[name].data
    before = _checksums(shared)
    yield
    changed = [name for name, checksum in _checksums(shared).items() if checksum != before[name]]
    if changed:
        raise ConfigError(
            f"{type(phase).__name__}.trains=False, but it changed {', '.join(changed[:3])} of its "
            "net in place, and with it the dense network: set trains = True, or change a copy"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    same = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return same and not a.is_meta and torch.equal(a, b)


def _checksums(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a checksum of the bytes of each parameter."""
    return {
        name: xxhash.xxh3_128_hexdigest(
            parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        )
        for name, parameter in parameters.items()
    }

"""The compact network of a run in int8: built, evaluated and saved next to the one in float.

    int8_weight_only      int8 weights, one scale per output channel; activations stay in float
    int8_dynamic          the same weights; int8 activations, one scale per token, at run time
    int8_dynamic_smooth   the same after SmoothQuant's scaling (`vitrim.network.smooth`)

All are symmetric: scale = max |row| / 127, values rounded to the nearest, zero stays zero. Every
Linear is quantised, the classifier included; convolutions, norms, biases, tokens and position
embeddings stay in float. int8_dynamic_smooth looks at SMOOTH_IMAGES training images, the others at
none. The plan of such a network has an Int8 edit for every layer. A Linear whose weight the network
reads without calling it keeps its activations in float.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrim.errors import ConfigError
from vitrim.network import stream, structure
from vitrim.network.int8 import int8_edits
from vitrim.network.smooth import smooth_
from vitrim.network.surgery import cut
from vitrim.plan import Plan

SMOOTH = "int8_dynamic_smooth"
SCHEMES = ("int8_weight_only", "int8_dynamic", SMOOTH)
SMOOTH_IMAGES = 128
"""Training images whose largest activations SmoothQuant's scaling takes."""
_EXPONENT = 0.5  # the paper's


class Quantized(NamedTuple):
    """A network in int8, the plan that leads to it, and its accuracy if there are images."""

    net: nn.Module
    plan: Plan
    accuracy: Mapping[str, float] | None


def check(schemes: object, *, accelerator: str) -> None:
    """Refuse what could not be quantised or evaluated on Lightning's `accelerator`.

    Raises:
        ConfigError: no list of different schemes, or a processor that cannot do it.
    """
    if not isinstance(schemes, list) or any(scheme not in SCHEMES for scheme in schemes):
        known = _format_schemes(SCHEMES)
        raise ConfigError(f"quantize={_format_schemes(schemes)}: expected a list out of {known}")
    if len({*schemes}) < len(schemes):
        raise ConfigError(f"quantize={_format_schemes(schemes)}: expected each scheme at most once")
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    if {*schemes} - {"int8_weight_only"} and on_cpu and not is_exact():
        raise ConfigError(
            f"quantize={_format_schemes(schemes)}: the int8 products of this processor overflow: "
            "choose int8_weight_only, trainer=gpu, or a processor with VNNI or AMX instructions"
        )


def check_smooth(net: nn.Module, *, trainable: bool) -> None:
    """Refuse int8_dynamic_smooth where there are no training images, or no norms to scale.

    Raises:
        ConfigError: there are no training images.
        UnsupportedArchitecture: `net` has no residual stream of tokens.
    """
    if not trainable:
        raise ConfigError(f"quantize: {SMOOTH} needs training images: omit it, or choose data")
    stream(net)


def in_int8(
    net: nn.Module, plan: Plan, scheme: str, images: Iterable[Tensor] = ()
) -> tuple[nn.Module, Plan]:
    """Return a copy of `net`, the result of `plan`, with all Linears in int8, and its plan.

    Layers that are int8 already stay as they are. `images` are batches (B, C, H, W) for
    int8_dynamic_smooth.

    Raises:
        ConfigError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme={scheme}: expected one of {', '.join(SCHEMES)}")
    if scheme == SMOOTH:
        net = smooth_(copy.deepcopy(net), images, exponent=_EXPONENT)
    edits = int8_edits(net, structure(net), dynamic=scheme != "int8_weight_only")
    int8 = cut(net, Plan(model=plan.model, edits=edits))
    return int8, replace(plan, edits=(*plan.edits, *edits))


def megabytes(net: nn.Module) -> float:
    """Return the size of the tensors of `net` that are saved, in 1e6 bytes."""
    nbytes: int = sum(tensor.nbytes for tensor in net.state_dict().values())
    return nbytes / 1e6


def report_entries(
    net: nn.Module, networks: Mapping[str, Quantized], latencies_ms: Sequence[float]
) -> dict[str, object]:
    """Return the entries of a report about `net` and its int8 networks by scheme.

    `latencies_ms` has one latency for each of `networks`.
    """
    if not networks:
        return {}
    rows = {}
    for (scheme, int8), latency_ms in zip(networks.items(), latencies_ms, strict=True):
        known = int8.accuracy
        accuracy = {name: None if known is None else known[name] for name in ("top1", "top5")}
        rows[scheme] = {**accuracy, "mb": megabytes(int8.net), "latency_ms": latency_ms}
    return {"float_mb": megabytes(net), "quantized": rows}


def is_exact() -> bool:
    """Whether this processor multiplies int8 matrices without overflow.

    Without VNNI or AMX, x86 adds pairs of products in 16 bits, which saturate.
    """
    left, right = (torch.full(shape, 127, dtype=torch.int8) for shape in ((32, 64), (64, 64)))
    return bool((torch._int_mm(left, right) == 127 * 127 * 64).all())


def _format_schemes(schemes: object) -> str:
    """Return `schemes` as one writes them on the command line."""
    return f"[{','.join(map(str, schemes))}]" if isinstance(schemes, list | tuple) else str(schemes)

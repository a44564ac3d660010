"""Post-training quantisation of a network's Linears to int8, by torchao, without calibration.

    int8_weight_only   int8 weights, one scale per output channel; activations stay in float
    int8_dynamic       the same weights; int8 activations, one scale per token, at run time

Both are symmetric: scale = max |row| / 127.5, values rounded to the nearest and clamped to
-128..127, zero stays zero. Every Linear is quantised, the classifier included; the patch
embedding's convolution, norms, biases, tokens and position embeddings stay in float.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vitrim.errors import ConfigError
from vitrim.network.attention import GatheredLinear

SCHEMES = ("int8_weight_only", "int8_dynamic")


def check(schemes: object, *, accelerator: str) -> None:
    """Refuse what could not be quantised or evaluated on Lightning's `accelerator`.

    Raises:
        ConfigError: no list of different schemes, no torchao, or a processor that cannot do it.
    """
    if not isinstance(schemes, list) or any(scheme not in SCHEMES for scheme in schemes):
        known = _format_schemes(SCHEMES)
        raise ConfigError(f"quantize={_format_schemes(schemes)}: expected a list out of {known}")
    if len({*schemes}) < len(schemes):
        raise ConfigError(f"quantize={_format_schemes(schemes)}: expected each scheme at most once")
    _torchao(_format_schemes(schemes))
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    if "int8_dynamic" in schemes and on_cpu and not is_exact():
        raise ConfigError(
            f"quantize={_format_schemes(schemes)}: the int8 products of this processor overflow, "
            "and the accuracy of int8_dynamic would be wrong: omit it, or choose trainer=gpu or a "
            "processor with VNNI or AMX instructions"
        )


def quantized(net: nn.Module, scheme: str) -> nn.Module:
    """Return a copy of `net` whose Linears are int8, for evaluation; `net` is not modified.

    Linears may have any width and be of a subclass, as long as F.linear reads their weight. Where
    `is_exact` returns False, do not run int8_dynamic on CPU.

    Raises:
        ConfigError: an unknown scheme, or torchao is missing.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme={scheme}: expected one of {', '.join(SCHEMES)}")
    torchao = _torchao(_format_schemes([scheme]))
    configs = {
        "int8_weight_only": torchao.Int8WeightOnlyConfig,
        "int8_dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
    }
    root = nn.Sequential(copy.deepcopy(net))  # so that every Linear has a parent
    _pad_single_inputs(root)
    torchao.quantize_(
        root,
        configs[scheme](set_inductor_config=False),  # a setting of the whole process
        filter_fn=lambda module, name: isinstance(module, nn.Linear),
    )
    return root[0]


def megabytes(net: nn.Module) -> float:
    """Return the size of the parameters and buffers of `net` in 1e6 bytes.

    An int8 weight has its integers, and a float32 scale and an int8 zero point per output channel.
    """
    return sum(_bytes(tensor) for tensor in (*net.parameters(), *net.buffers())) / 1e6


def evaluate_schemes(
    net: nn.Module,
    schemes: Sequence[str],
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
) -> dict[str, object]:
    """Return the entries of a report about `net` quantised by each scheme: accuracy and megabytes.

    `evaluate` returns top1 and top5 in percent; it is None where there are no images.
    """
    names = ("top1", "top5")
    rows: dict[str, dict[str, float | None]] = {}
    for scheme in schemes:
        int8 = quantized(net, scheme)
        accuracy = None if evaluate is None else evaluate(int8)
        percent = {name: None if accuracy is None else accuracy[name] for name in names}
        rows[scheme] = {**percent, "mb": megabytes(int8)}
    return {"float_mb": megabytes(net), "quantized": rows}


def is_exact() -> bool:
    """Whether this processor multiplies int8 matrices without overflow.

    Without VNNI or AMX, x86 adds pairs of products in 16 bits, which saturate.
    """
    probe = nn.Linear(64, 64, bias=False, device="meta").to_empty(device="cpu")
    nn.init.ones_(probe.weight)
    with torch.no_grad():
        product: Tensor = quantized(probe, "int8_dynamic")(torch.ones(2, 64))
    return bool(product.sub(64).abs().max() < 1)


def _format_schemes(schemes: object) -> str:
    """Return `schemes` as one writes them on the command line."""
    return f"[{','.join(map(str, schemes))}]" if isinstance(schemes, list | tuple) else str(schemes)


def _torchao(schemes: str) -> ModuleType:
    """Return torchao's quantisation module, imported when `schemes` first need it."""
    try:
        with _quiet("torch.utils._pytree", "torchao"):
            from torchao import quantization
    except ImportError as error:
        raise ConfigError(
            f"quantize={schemes}: torchao cannot be imported ({error}): pip install torchao, or "
            "quantize=[]"
        ) from None
    module: ModuleType = quantization
    return module


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Suppress the warnings of these loggers: about torchao's enums and kernels not used here."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _pad_single_inputs(root: nn.Module) -> None:
    """Let the Linears below `root` that have one input read it twice, with zero weights.

    torchao cannot compute the scales of a matrix with one column, and torch multiplies such int8
    matrices wrongly on CPU.
    """
    for parent in [*root.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child) is nn.Linear and child.in_features == 1:
                setattr(parent, name, _padded(child))


def _padded(linear: nn.Linear) -> GatheredLinear:
    index = torch.zeros(2, dtype=torch.long, device=linear.weight.device)
    weight = nn.Parameter(F.pad(linear.weight.detach(), (0, 1)))
    padded = GatheredLinear(weight=weight, bias=linear.bias, index=index, in_features=1)
    return padded.train(linear.training)


def _bytes(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes

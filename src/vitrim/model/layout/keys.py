"""What every layout is made of: keys that mark it, and rules that rename keys to timm's."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]
_TEXT = ("text_model.", "text_projection.", "text_embeds", "logit_scale", "logit_bias")
_QUERY = re.compile(r"(.*\battn)\.q\.weight")


def unchanged(state: State, expected: Collection[str]) -> State:
    """Return `state` itself."""
    return state


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The names that a library gives to the tensors of one kind of network.

    Args:
        name: of library and network, as messages and `vitrim-import --format` show it.
        marks: keys that every network of the kind has, and a regular expression for each, which
            also accepts its spellings in other versions of the library.
        rules: regular expressions and what replaces them in every key, in this order.
        dropped: a regular expression for keys, once renamed, that timm's network does not have.
        arrange: what is done to the renamed tensors, for a network with the given keys.
    """

    name: str
    marks: Mapping[str, str]
    rules: Rules = ()
    dropped: str = ""
    arrange: Callable[[State, Collection[str]], State] = unchanged

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the marks that no key has."""
        keys = list(keys)
        return [
            mark
            for mark, pattern in self.marks.items()
            if not any(re.search(pattern, key) for key in keys)
        ]

    def to_timm(self, state: Mapping[str, Tensor], expected: Collection[str]) -> State:
        """Return the tensors of `state` as timm names and arranges them.

        Args:
            state: tensors in this layout.
            expected: the keys of timm's network.
        """
        if not self.rules:
            return dict(state)
        kept = without_text_tower(state)
        renamed = {rename(key, self.rules): state[key] for key in kept}
        if self.dropped:
            renamed = {k: v for k, v in renamed.items() if not re.search(self.dropped, k)}
        return self.arrange(renamed, expected)


def exactly(*keys: str) -> dict[str, str]:
    r"""Return marks for keys that are spelt in one way.

    >>> exactly("norm.weight")
    {'norm.weight': '^norm\\.weight$'}
    """
    return {key: f"^{re.escape(key)}$" for key in keys}


def rename(key: str, rules: Rules) -> str:
    """Return a key with every rule applied.

    >>> rename("layer.0.norm", ((r"^layer", "blocks"), ("norm$", "norm1")))
    'blocks.0.norm1'
    """
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def without_text_tower(keys: Iterable[str]) -> list[str]:
    """Return the keys that are not those of the text tower of an image-text network."""
    return [key for key in keys if not key.startswith(_TEXT)]


def fused(state: State, expected: Collection[str] = ()) -> State:
    """Return the state with `attn.q`, `attn.k` and `attn.v` as the rows of one `attn.qkv`.

    A bias that some of the three lack is zero there. `expected` is not used.
    """
    result = dict(state)
    for key in state:
        found = _QUERY.fullmatch(key)
        if found is None:
            continue
        attention = found[1]
        weights = [result.pop(f"{attention}.{part}.weight", None) for part in "qkv"]
        biases = [result.pop(f"{attention}.{part}.bias", None) for part in "qkv"]
        present = [weight for weight in weights if weight is not None]
        result[f"{attention}.qkv.weight"] = torch.cat(present)
        if any(bias is not None for bias in biases):
            rows = [
                weight.new_zeros(len(weight)) if bias is None else bias
                for weight, bias in zip(present, biases, strict=False)
            ]
            result[f"{attention}.qkv.bias"] = torch.cat(rows)
    return result

"""Configuration keys of version 0.1.0: what they are called now."""

from __future__ import annotations

from collections.abc import Mapping

RENAMED: Mapping[str, str] = {
    "transfer": "method=transfer",
    "method.together": "method.group_size",
    "method.spare": "method.protected",
    "method.extra": "method.extra_blocks",
    "method.only": "method.allowed_blocks",
    "method.reuse": "method.unit_selection",
    "method.regression": "method.reconstruct",
    "method.metric_set": "method.judging_set",
    "method.dream": "method.synthetic",
    "method.dream.smooth": "method.synthetic.tv_weight",
    "method.dream.power": "method.synthetic.tv_exponent",
    "method.dream.small": "method.synthetic.l2_weight",
    "method.tuning.front": "method.tuning.freeze_tail",
    "method.tuning.pooled": "method.tuning.pooled_weight",
    "method.tuning.logits": "method.tuning.logits_weight",
    "method.pooled": "method.pooled_weight",
    "method.adaptors": "method.recoverability",
    "method.pace": "method.site_rates",
    "method.sampling.readout": "method.sampling.class_token_weight",
    "method.sampling.given": "method.sampling.available_images",
    "method.positions": "method.samples_per_image",
    "method.spread": "method.error_exponent",
    "method.max_share": "method.max_rank_fraction",
    "method.loss_images": "method.gradient_images",
    "method.ridges.derivatives": "method.ridges.gradient_shrinkage",
}
"""Former key -> present key; where a key became a choice, what to write instead."""
RENAMED_VALUES: Mapping[tuple[str, str | bool], str] = {
    ("method.unit_selection", "surgeon"): "obs_greedy",
    ("method.criterion", "surgeon"): "obs_greedy",
    ("method.judging_set", "dream"): "synthetic",
    ("method.qkv", "together"): "fused",
    ("method.qkv", "split"): "separate",
    ("method.recoverability", True): "least_squares",
    ("method.recoverability", False): "no_adaptors",
}
"""Present key and former value -> present value."""


def present_key(key: str) -> str:
    """Return the present name of a dotted key, by its longest renamed beginning."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        former = ".".join(parts[:length])
        if former in RENAMED:
            return ".".join([RENAMED[former], *parts[length:]])
    return key


def renamed_key(key: str) -> str | None:
    """Return one line that names the present key; None if `key` is no former one."""
    now = present_key(key)
    return None if now == key else f"{key} was renamed: use {now}"

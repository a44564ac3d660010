"""Random budgets of random methods on small networks: `python -m tests.budgets --cases 1000`.

A case is a network with random weights, a method with some of its options changed, and a budget.
The method plans without images (gates have random scores). Either it refuses the budget before
planning, or its plan is within the budget and no step could be given back (`shortfalls`); each
case is drawn from its number, so `--first N --cases 1` repeats one. Prints the cases that fail and
a summary; exits with 1 if any failed.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from vitrim import Keep, Plan, count, cut
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target
from vitrim.cli.compose import CONF, register_resolvers
from vitrim.errors import VitrimError
from vitrim.method import Method
from vitrim.network import UnsupportedArchitecture
from vitrim.network.structure import cuttable_channels
from vitrim.network.survivors import propagate
from vitrim.plan import Evidence, Proposal

TINY = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 3, "num_classes": 7}
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": TINY,
    "deit_tiny_distilled_patch16_224": TINY,
    "vit_giant_patch14_dinov2": {**TINY, "img_size": 28},
    "vit_base_patch16_siglip_224": TINY,
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 12,
        "depths": [2, 2, 2],
        "num_heads": [2, 3, 6],
    },
    "swinv2_tiny_window8_256": {
        "img_size": 64,
        "window_size": 4,
        "embed_dim": 12,
        "depths": [2, 2],
        "num_heads": [2, 4],
    },
    "beit_base_patch16_224": TINY,
    "eva02_tiny_patch14_224": {**TINY, "img_size": 28},
    "vit_small_patch16_dinov3": {**TINY, "embed_dim": 48},
    "cait_xxs24_224": {"depth": 2, "embed_dim": 24, "num_heads": 2},
    "pvt_v2_b0": {"embed_dims": [8, 16, 24, 32], "num_heads": [1, 2, 3, 4]},
    "levit_128s": {},
    "mobilevit_xxs": {},
    "twins_svt_small": {"depths": [1, 1, 2, 1], "embed_dims": [16, 32, 64, 128]},
    "mixer_s32_224": {},
    "resmlp_12_224": {},
    "hiera_tiny_224": {},
    "edgenext_xx_small": {},
    "resnet18": {"channels": [8, 16, 24, 32]},
    "resnet50": {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
    "mobilenetv2_050": {},
    "convnext_atto": {"depths": [1, 1, 2, 1]},
}
"""timm's names, and the arguments that make them small."""

SCOPE = {"scope": ("global", "site"), "round_to": (1, 1, 3, 8)}
OPTIONS: dict[str, dict[str, Sequence[Any]]] = {
    "vtp": {**SCOPE, "even_heads": (False, True)},
    "oneshot": {
        **SCOPE,
        "even_heads": (False, True),
        "criterion": ("random", "group_l2", "obs_greedy"),
        "sites": (
            ["mlp"],
            ["mlp"],
            ["heads"],
            ["v"],
            ["qk"],
            ["heads", "mlp"],
            ["mlp", "heads", "qk", "v"],
            ["channels"],
        ),
    },
    "fskd": SCOPE,
    "cd": SCOPE,
    "mixed_rank": {
        "qkv": ("fused", "separate"),
        "allocation": ("uniform", "energy", "error"),
        "decomposition": ("plain",),
        "max_rank_fraction": (0.7, 1.0),
        "layers": (["qkv", "proj", "fc1", "fc2"], ["fc1"], ["qkv", "fc2"]),
    },
    "dcvit": {"protected": ([1, 1], [0, 0]), "group_size": (1, 1, 2)},
    "practise": {"protected": ([0, 0], [1, 0])},
}
"""Methods, and what some of their options are drawn from."""
METRICS = ("macs", "params", "units", "blocks")
USUAL = {
    "mixed_rank": ("macs", "params"),
    "dcvit": ("macs", "blocks"),
    "practise": ("macs", "blocks"),
}
"""Metrics of methods that refuse some; these are drawn in three of four cases."""


@cache
def network(name: str) -> tuple[nn.Module, Cost] | None:
    """Return a network with random weights and its closed formula; None if it is not supported."""
    torch.manual_seed(0)
    net = timm.create_model(name, **NETWORKS[name]).eval()
    side = NETWORKS[name].get("img_size")
    size = (side, side) if side else timm.get_pretrained_cfg(name).input_size
    try:
        return net, Cost(net, size)
    except UnsupportedArchitecture:
        return None


@cache
def settings(method: str) -> dict[str, Any]:
    """Return the resolved choices of conf/method/`method`.yaml."""
    GlobalHydra.instance().clear()
    register_resolvers()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=[f"method={method}", "data=none"])
    values: dict[str, Any] = OmegaConf.to_container(cfg.method, resolve=True)
    return values


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, a method with its options, and a budget."""

    number: int
    network: str
    method: str
    options: Mapping[str, Any]
    target: Target

    def __str__(self) -> str:
        words = [f"method.{key}={value}" for key, value in self.options.items()]
        budget = f"target.{self.target.metric}={self.target.keep}"
        return f"{self.number}: {self.network} method={self.method} {' '.join(words)} {budget}"

    def run(self) -> str:
        """Return "met", or "refused" and why.

        Raises:
            AssertionError: the budget is exceeded, or more could have been kept.
        """
        found = network(self.network)
        if found is None:
            return "refused: this network is not supported"
        net, cost = found
        method: Method = instantiate(settings(self.method) | self.options, _convert_="all")
        evidence = self._evidence(cost)
        try:
            method.check(cost, self.target)
        except VitrimError as error:
            return f"refused: {error}"
        if self.target.is_identity:
            return "met"  # a run copies the network, and asks no method
        proposal = method.plan(net, evidence, cost, self.target)
        problems = [*shortfalls(self, cost, proposal)]
        assert not problems, problems[0]
        if self.number % 20 == 0:
            plan = Plan(model={}, edits=proposal.edits)
            assert count(cut(net, plan), cost.input_size)[:2] == cost.plan(plan)[:2]
        return "met"

    def _evidence(self, cost: Cost) -> Evidence:
        """Return random gates for VTP, and nothing for the methods that need images."""
        if self.method != "vtp":
            return Evidence()
        generator = torch.Generator().manual_seed(self.number)
        sites = cost.structure.sites
        return Evidence(
            scores={
                name: torch.rand(sites[name].size, generator=generator)
                for name in scored_by(self, cost)
            }
        )


def case(number: int) -> Case:
    """Return the case of a number."""
    draw = random.Random(number)
    method = draw.choice([*OPTIONS])
    metric = draw.choice(USUAL.get(method, METRICS[:3]) if draw.random() < 0.75 else METRICS)
    keep: float = round(draw.uniform(0.4, 0.99), draw.choice((1, 3, 6)))
    if metric == "blocks":
        keep = round(draw.uniform(0.2, 2.0), 2)
    return Case(
        number=number,
        network=draw.choice([*NETWORKS]),
        method=method,
        options={key: draw.choice(values) for key, values in OPTIONS[method].items()},
        target=Target(metric=metric, keep=keep),
    )


def scored_by(one: Case, cost: Cost) -> list[str]:
    """Return the sites that a method ranks the units of."""
    from vitrim.method import cd, fskd, oneshot, vtp

    described = cost.structure
    match one.method:
        case "vtp":
            return [*dict.fromkeys(vtp.gates_of(described).values())]
        case "oneshot":
            return [site.name for site in oneshot.sites_of(described, one.options["sites"])]
        case "fskd":
            return cuttable_channels(
                described, [fskd.SITES[name] for name in settings("fskd")["sites"]]
            )
        case "cd":
            return cuttable_channels(
                described, [cd.SITES[name] for name in settings("cd")["sites"]]
            )
        case _:
            return []


def shortfalls(one: Case, cost: Cost, proposal: Proposal) -> Iterator[str]:
    """Iterate over what is wrong with the size of a plan."""
    scored = scored_by(one, cost)
    metric, limit = one.target.counted_metric, cost.limit(one.target, scored)
    reached = cost.plan(Plan(model={}, edits=proposal.edits), scored).of(metric)
    if reached > limit:
        yield f"{reached:,} {metric} remain, {reached - limit:,} above the target"
    room = limit - reached
    if scored:
        larger = larger_plans(one, cost, proposal, scored)
    elif one.method == "mixed_rank":
        larger = larger_ranks(cost, proposal)
    else:
        larger = larger_blocks(cost, proposal)
    for what, edits in larger:
        amount = cost.plan(Plan(model={}, edits=edits), scored).of(metric)
        if reached < amount <= limit:
            yield f"{what} needs {amount - reached:,} {metric}, and {room:,} are left"


def larger_plans(
    one: Case, cost: Cost, proposal: Proposal, scored: Sequence[str]
) -> Iterator[tuple[str, tuple[Keep, ...]]]:
    """Iterate over the plans that keep one more step of a site, or of a head of it.

    Of heads that are gone only those whose dims are not ranked: else it is not known which of them
    the step would bring back. Where all sites lose the same fraction, only sites that lost most.
    """
    described, options = cost.structure, one.options
    sites, round_to = described.sites, options["round_to"]
    by_site = {keep.site: list(keep.index) for keep in proposal.edits}
    kept = {name: by_site.get(name, [*range(sites[name].size)]) for name in scored}
    lost = {name: 1 - len(kept[name]) / sites[name].size for name in scored}
    with_heads = any(sites[name].head_dims or sites[name].kind == "heads" for name in scored)
    for name in scored:
        if options["scope"] == "site" and (with_heads or lost[name] < max(lost.values()) - 1e-9):
            continue
        attentions = [a for a in described.attentions if name in (a.heads, a.qk, a.v)]
        also = [
            other
            for a in attentions
            for other in (a.heads, a.qk, a.v)
            if other in {*scored} - {name}
        ]
        heads = _heads(sites[name].head_dims or (sites[name].size,))
        back = [_next(head, kept[name], round_to) for head in heads]
        if options.get("even_heads"):
            back = [[unit for units in back for unit in units]]
        alive = [any(unit in kept[name] for unit in head) for head in heads]
        for units, head_is_there in zip(back, alive, strict=False):
            if units and (head_is_there or not also):
                larger = {**kept, name: sorted([*kept[name], *units])}
                yield f"keeping {len(units)} more of {name}", _edits(cost, larger)


def _heads(dims: Sequence[int]) -> list[range]:
    ends = [*accumulate(dims, initial=0)]
    return [range(start, end) for start, end in pairwise(ends)]


def _next(head: range, kept: Sequence[int], round_to: int) -> list[int]:
    """Return the units that widen a head by a step."""
    gone = sorted({*head} - {*kept})
    return gone[: min(round_to, len(gone))]


def _edits(cost: Cost, kept: Mapping[str, Sequence[int]]) -> tuple[Keep, ...]:
    tensors: dict[str, Tensor] = {name: torch.tensor(index) for name, index in kept.items()}
    survivors = propagate(cost.structure, tensors)
    sites = cost.structure.sites
    return tuple(
        Keep(site=name, index=tuple(index.tolist()))
        for name, index in survivors.items()
        if 0 < len(index) < sites[name].size and not sites[name].locked_reason
    )


def larger_ranks(cost: Cost, proposal: Proposal) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Iterate over the plans with one more rank in a layer, or with a dense layer in its place."""
    for position, edit in enumerate(proposal.edits):
        before, after = proposal.edits[:position], proposal.edits[position + 1 :]
        yield f"a dense {edit.linear}", (*before, *after)
        more = type(edit)(linear=edit.linear, rank=edit.rank + 1)
        yield f"one more rank of {edit.linear}", (*before, more, *after)


def larger_blocks(cost: Cost, proposal: Proposal) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Iterate over the plan without its last dropped block, or with the unit that is next.

    Units of dense compression stay in turns: next is the block that has the smallest share of them.
    """
    blocks: list[str] = list(proposal.notes["blocks"])  # type: ignore[call-overload]
    sites, keeps = cost.structure.sites, [e for e in proposal.edits if isinstance(e, Keep)]
    if not keeps:
        edits = tuple(
            edit
            for edit in proposal.edits
            if not blocks or not f"{edit.branch}.".startswith(f"{blocks[-1]}.")
        )
        yield f"block {blocks[-1:]}", edits
        return

    def turn(keep: Keep) -> tuple[float, int]:
        block = next(block for block in blocks if keep.site.startswith(f"{block}."))
        return (len(keep.index) + 1) / sites[keep.site].size, blocks.index(block)

    first = min(keeps, key=turn)
    index = tuple(sorted((*first.index, min({*range(sites[first.site].size)} - {*first.index}))))
    rest = tuple(edit for edit in proposal.edits if edit != first)
    wider = (Keep(site=first.site, index=index),) if len(index) < sites[first.site].size else ()
    yield f"one more unit of {first.site}", (*rest, *wider)


def main() -> None:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.budgets", description=__doc__)
    parser.add_argument("--cases", type=int, default=200, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--refusals", action="store_true", help="print why budgets were refused")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    for number in range(arguments.first, arguments.first + arguments.cases):
        one = case(number)
        try:
            said = one.run()
        except Exception as error:  # any error is a finding here
            said = "failed"
            print(f"{one}\n    {type(error).__name__}: {error}", flush=True)
        if arguments.refusals and said.startswith("refused"):
            print(f"{one}\n    {said}", flush=True)
        outcomes[said.partition(":")[0]] += 1
    print(", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())))
    sys.exit(1 if outcomes["failed"] else 0)


if __name__ == "__main__":
    main()

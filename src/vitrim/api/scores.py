"""What can be cut, scores of it, and a plan from scores: `sites`, `score`, `trim`, `plan_for`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vitrim.api.given import image_shape
from vitrim.api.images import check_images, hold
from vitrim.api.settings import build_method
from vitrim.budget import trim as trimming
from vitrim.budget.cost import Cost
from vitrim.budget.target import METRICS, Target
from vitrim.closed_form.importance import importance
from vitrim.data import sample_indices
from vitrim.errors import ConfigError
from vitrim.method.oneshot import OneShot, sites_of
from vitrim.model.identify import Identified, identify
from vitrim.network import sites as cuttable_sites
from vitrim.network import structure
from vitrim.network.structure import Site
from vitrim.plan import Edit, Plan
from vitrim.trainer.calibrate import Calibrate

_HEAD, _TAIL = 12, 4


class Sites(tuple[Site, ...]):
    """The sites of a network in network order: what can be cut, of which kind, and how large."""

    def __repr__(self) -> str:
        """Return a table, without the middle of a long one."""
        rows = [("name", "kind", "size"), *((s.name, s.kind, f"{s.size:,}") for s in self)]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1, 2)]
        lines = [
            f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {size:>{widths[2]}}"
            for name, kind, size in rows
        ]
        if len(lines) > _HEAD + _TAIL + 1:
            left_out = len(lines) - _HEAD - _TAIL
            lines[_HEAD:-_TAIL] = [f"... {left_out} more"]
        return "\n".join(lines)


def sites(net: nn.Module) -> Sites:
    """Return the sites of `net`, dense or cut, whose units can be removed.

    >>> import timm
    >>> sites(timm.create_model("vit_tiny_patch16_224", depth=1))
    name                 kind    size
    blocks.0.attn.input  input    192
    blocks.0.attn.heads  heads      3
    blocks.0.attn.qk     qk       192
    blocks.0.attn.v      v        192
    blocks.0.mlp.input   input    192
    blocks.0.mlp.hidden  hidden   768

    Raises:
        UnsupportedArchitecture: its class belongs to no family that can be cut.
    """
    return Sites(cuttable_sites(net).values())


def plan_for(net: nn.Module, edits: Sequence[Edit] = ()) -> Plan:
    """Return the plan of `edits` on the dense network `net`, whose name and arguments are found.

    Raises:
        ConfigError: it computes something else than timm's network of its name.
    """
    return Plan(model=identify(net).model, edits=tuple(edits))


def score(
    net: nn.Module,
    images: object = None,
    *,
    criterion: str = "obs_greedy",
    kinds: Sequence[str] = ("mlp",),
    n_images: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return how much each unit matters, by site: (size,) each, higher is kept.

    Args:
        net: a dense network of timm; not modified.
        images: as `vitrim.compress` takes them; None: for criteria that look at weights alone.
        criterion: random, magnitude, group_l2, taylor, variance, output_energy, obs or obs_greedy
            (`vitrim.closed_form.importance`).
        kinds: any of mlp, heads, qk, v and channels.
        n_images: how many of the images are used; None: up to 1000.
        batch_size: of the pass over the images.
        seed: by which images are drawn, and of random scores.

    Raises:
        VitrimError: the network cannot be cut, or the images do not fit it.
    """
    found = identify(net)
    changes = {"criterion": criterion, "sites": [*kinds], "compensation": "none"}
    method = build_method("oneshot", changes, seed=seed)
    assert isinstance(method, OneShot)
    scorer = method.scorer(found.net.to(found.device))
    if scorer.epochs:
        _observe(scorer, found, images, n_images or method.sampling.images, batch_size, seed)
    described, moments = structure(found.net), scorer.evidence().moments
    net = found.net.to("cpu")
    return {
        site.name: importance(
            net,
            described,
            moments,
            site,
            criterion=method.criterion,
            ridge=method.ridges.order,
            seed=seed,
        )
        for site in sites_of(described, kinds)
    }


def _observe(
    scorer: Calibrate,
    found: Identified,
    images: object,
    n_images: int,
    batch_size: int,
    seed: int,
) -> None:
    """Show images to the scorer."""
    if images is None:
        raise ConfigError("images: this criterion needs some; magnitude and group_l2 need none")
    held = hold(images, most=n_images)
    chosen = sample_indices(len(held), n_images, seed)
    shape, any_size = image_shape(found)
    check_images(held, chosen, shape, any_size=any_size)
    scorer.to(found.device).on_train_start()
    for number, start in enumerate(range(0, len(chosen), batch_size)):
        batch = torch.stack([held[index][0] for index in chosen[start : start + batch_size]])
        scorer.training_step((batch.to(found.device), torch.empty(0)), number)
    scorer.on_train_end()
    scorer.to("cpu")


def trim(
    net: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    scope: trimming.Scope = "global",
    round_to: int = 1,
    **budget: float,
) -> Plan:
    """Return the plan that removes the units of the lowest scores until a budget is met.

    Args:
        net: the dense network of timm that the scores are of.
        scores: by site (`sites`), one number per unit, (size,), higher is kept; from `score` or
            from anywhere.
        scope: global: all units are in one ranking; site: every site loses the same fraction.
        round_to: kept widths are multiples of this.
        **budget: macs or params, a fraction or a number; units; size_mb; or blocks.

    Raises:
        VitrimError: a score is missing or not finite, or the budget cannot be met.
    """
    metric, keep = _only(budget)
    if not scores:
        raise ConfigError("scores: expected one tensor a site, by name (vitrim.sites lists them)")
    found = identify(net)
    shape, _ = image_shape(found)
    cost = Cost(found.net, shape)
    target = Target(metric=metric, keep=keep)  # type: ignore[arg-type]  # it checks the metric
    on_cpu = {name: torch.as_tensor(value).detach().cpu() for name, value in scores.items()}
    edits = trimming.trim(cost, on_cpu, target, scope=scope, round_to=round_to)
    return Plan(model=found.model, edits=edits, method="own scores")


def _only(budget: Mapping[str, float]) -> tuple[str, float]:
    """Return the one budget.

    Raises:
        ConfigError: there is none, several, or one of another name.
    """
    if len(budget) != 1 or not budget.keys() <= {*METRICS}:
        given = ", ".join(f"{name}={keep}" for name, keep in budget.items()) or "none"
        raise ConfigError(f"budget: {given}: expected one of {', '.join(METRICS)}")
    ((metric, keep),) = budget.items()
    return metric, keep

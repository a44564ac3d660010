"""Losses of units that go in an order which a criterion gives, by site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrim.closed_form.importance import Criterion, consumer_of, importance
from vitrim.closed_form.moments import MomentTensors
from vitrim.closed_form.query_key import query_key_moments, query_key_spectrum
from vitrim.closed_form.reconstruction import Compensation
from vitrim.network.structure import Layer, Site
from vitrim.network.survivors import head_of
from vitrim.sensitivity import edits
from vitrim.sensitivity.losses import (
    Rotation,
    plain_losses_in_order,
    plain_unit_losses,
    query_key_rotation,
    unit_losses_in_order,
)
from vitrim.sensitivity.parts import parts_of_sites
from vitrim.sensitivity.passes import Passes
from vitrim.sensitivity.predict import layer_effects, rising, scaled, weight_of
from vitrim.sensitivity.probes import Probe, rounded
from vitrim.sensitivity.settings import LossSettings
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.shared_pass import Share

_LEAST = 1e-12  # of a loss, where a ratio of two is taken


class UnitOrder(NamedTuple):
    """The order of units: see `vitrim.closed_form.importance.importance`."""

    criterion: Criterion
    ridge: float
    seed: int


class OrderedLosses:
    """Predict what the units of sites lose in the order of a criterion; scale it by measurements.

    The loss is the KL divergence (nats) from the dense network's decision. What the cut does to the
    kept weights, `compensation`, is part of the prediction and of the measurements; queries and
    keys that are compensated lose directions of their best smaller product, as in
    `vitrim.closed_form.reconstruction`. Heads lose their values.

    Args:
        net: the dense network.
        sites: whose units go.
        order: in which they go.
        compensation: of the cut.
        sampling: which tokens count.
        fold_ridge: of the compensation, see `vitrim.closed_form.reconstruction`.
        choices: how losses are predicted.

    Raises:
        ConfigError: the units of a site are not read by a Linear.
    """

    def __init__(
        self,
        net: nn.Module,
        sites: Sequence[str],
        *,
        order: UnitOrder,
        compensation: Compensation,
        sampling: Sampling,
        fold_ridge: float,
        choices: LossSettings,
    ) -> None:
        self.net = net
        self.parts = parts_of_sites(net, sites)
        self.sites: Sequence[str] = [*sites]
        self.order = order
        self.compensation = compensation
        self.fold_ridge = fold_ridge
        self.choices = choices
        self.settings: Mapping[str, object] = {
            "order": [*order],
            "compensation": compensation,
            "fold_ridge": fold_ridge,
            **asdict(choices),
        }
        self.passes = Passes(
            net,
            self.parts,
            sampling=sampling,
            temperature=choices.temperature,
            kept_images=choices.scaling.images,
        )
        self.epochs = self.passes.epochs
        self.shares: Sequence[Share] = self.passes.shares
        self._attentions = {attention.qk: attention for attention in self.parts.attentions}
        self._folds = compensation in ("ridge", "sequential")

    def observe(self, images: Tensor, epoch: int) -> None:
        """Take in a batch of images (B, C, H, W)."""
        self.passes.observe(images, epoch)

    @torch.no_grad()
    def conclude(self, moments: MomentTensors) -> dict[str, Tensor]:
        """Return what each unit adds to the loss, by site, (units,), rising in the order.

        Args:
            moments: from which the order follows.
        """
        self.passes.finish()
        orders = {site.name: order_of(self._importance(moments, site)) for site in self.parts.sites}
        steps = {
            name: rising(self._predicted(self.parts.described.sites[name], order)[order])
            for name, order in orders.items()
        }
        probes = [
            rounded(self.net, probe)
            for site in self.parts.sites
            for probe in self._probes(site, orders[site.name], steps[site.name], moments)
        ]
        measured = [*zip(probes, self.passes.measure(probes), strict=True)]
        found = {}
        for name, order in orders.items():
            points = [
                (probe.share, max(loss, _LEAST) / max(probe.predicted, _LEAST))
                for probe, loss in measured
                if probe.site == name
            ]
            losses = scaled(steps[name], points)
            found[name] = torch.empty_like(losses).index_copy_(0, order, losses)
        return found

    def _importance(self, moments: MomentTensors, site: Site) -> Tensor:
        described, (criterion, ridge, seed) = self.parts.described, self.order
        return importance(
            self.net, described, moments, site, criterion=criterion, ridge=ridge, seed=seed
        ).cpu()

    def _predicted(self, site: Site, order: Tensor) -> Tensor:
        """Return what each unit adds to the loss in this order, (units,)."""
        if site.kind == "qk":
            return self._of_query_keys(site, order) * self.passes.unit
        layer, groups = self._read(site)
        of_layer = self.passes.statistics.of_layer(layer.name)
        cov, mean = of_layer["cov"], of_layer["mean"]
        if self.compensation == "none":
            cov = cov + of_layer["scale"] * torch.outer(mean, mean)
        effects = layer_effects(self.net, layer.name, of_layer, self.choices.gradient_shrinkage)
        of_units = torch.cat([groups[unit] for unit in order.tolist()])
        if self._folds:
            losses = unit_losses_in_order(effects, cov, of_units, self.order.ridge)
        else:
            losses = plain_unit_losses(effects, cov, of_units)
        return torch.stack([losses[group].sum() for group in groups]) * self.passes.unit

    def _of_query_keys(self, site: Site, order: Tensor) -> Tensor:
        statistics, heads = self.passes.statistics, head_of(site)
        attention = self._attentions[site.name]
        losses = torch.zeros(site.size, dtype=torch.float64)
        for head in range(len(site.head_dims)):
            q, k, weight = statistics.of_head(site.name, head)
            of_head = order[heads[order] == head]
            divisor = weight * statistics.dense_width(attention)
            if self._folds:
                losses[of_head] = query_key_rotation(q, k, divisor).losses.flip(0)
            elif divisor:
                first = int(of_head.min())
                of_dims = plain_losses_in_order(q * k / divisor, of_head - first)
                losses[first : first + len(of_dims)] = of_dims
        return losses

    def _read(self, site: Site) -> tuple[Layer, list[Tensor]]:
        """Return the layer that reads a site's units, and the inputs that each unit is."""
        described = self.parts.described
        for attention in described.attentions:
            if attention.heads == site.name:
                of_head = head_of(described.sites[attention.v])
                groups = [(of_head == head).nonzero()[:, 0] for head in range(site.size)]
                return consumer_of(described, attention.v), groups
        return consumer_of(described, site.name), [*torch.arange(site.size)[:, None]]

    def _probes(
        self, site: Site, order: Tensor, steps: Tensor, moments: MomentTensors
    ) -> Iterator[Probe]:
        """Iterate over the removals of shares of a site."""
        for share in self.choices.scaling.shares if self.choices.scaling.images else ():
            n = round(share * site.size)
            if 0 < n < site.size:
                branch, values = self._without(site, order[:n], moments)
                yield Probe(site.kind, site.name, share, (branch,), values, float(steps[:n].sum()))

    def _without(
        self, site: Site, removed: Tensor, moments: MomentTensors
    ) -> tuple[str, dict[str, Tensor]]:
        """Return the branch of a site, and its parameters after units went as the cut does it."""
        if site.kind == "qk":
            attention = self._attentions[site.name]
            if not self._folds:
                keys = edits.without_keys(self.net, attention.qkv, site.size, removed)
                return attention.branch, keys
            lost = torch.bincount(head_of(site)[removed], minlength=len(site.head_dims)).tolist()
            widths = [dim - n for dim, n in zip(site.head_dims, lost, strict=True)]
            rotations = _rotations(moments[site.name], site)
            return attention.branch, edits.without_query_keys(
                self.net, attention.qkv, rotations, widths
            )
        layer, groups = self._read(site)
        columns, plain = torch.cat([groups[unit] for unit in removed.tolist()]), moments[layer.name]
        if self._folds:
            fold = self.fold_ridge
            return layer.branch, edits.without_units(self.net, layer.name, columns, plain, fold)
        weight = weight_of(self.net, layer.name).clone()
        weight[:, columns] = 0.0
        if self.compensation == "none":
            return layer.branch, {f"{layer.name}.weight": weight}
        return layer.branch, edits.with_weight(self.net, layer.name, weight, plain["mean"])


def order_of(importance: Tensor) -> Tensor:
    """Return the units from the least important one on; of equal ones the last goes first."""
    return len(importance) - 1 - importance.flip(0).argsort(stable=True)


def _rotations(moments: Mapping[str, Tensor], site: Site) -> list[Rotation]:
    """Return the bases of every head's best smaller products of queries and keys."""
    rotations = []
    for head, width in enumerate(site.head_dims):
        q, k = (matrix[:width, :width] for matrix in query_key_moments(moments, head))
        (of_q, of_k), spectrum = query_key_spectrum(q, k)
        rotations.append(Rotation(of_q.mT, of_k.mT, spectrum.square()))
    return rotations

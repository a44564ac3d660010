"""The scorer of predicted losses: statistics in one pass, then losses, scaled by measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from vitrim.closed_form.moments import key_of
from vitrim.plan import Evidence
from vitrim.sensitivity.parts import parts_of
from vitrim.sensitivity.passes import Passes
from vitrim.sensitivity.predict import predict, probes_of
from vitrim.sensitivity.results import result_names, results
from vitrim.sensitivity.settings import LossRidges, Scaling
from vitrim.sensitivity.statistics import Statistics
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.shared_pass import SharedPass


class LossScorer(SharedPass):
    """Pass calibration images through a network and back once; then predict and measure losses.

    Evidence has `scores`: what removing each unit, direction or component costs, in nats of the KL
    divergence (at `temperature`) from the dense network's decision, by site or layer. `moments`
    has, by layer, `cov` and `mean` of the inputs of those that read units; by query-key or value
    site `rows` and `columns` (heads, K, K), the bases of its directions; and under `network` the
    losses of whole branches and of int8, and the measurements (`probe_table`). Networks without a
    classifier see their images twice: first for the covariance of the features. Of the ranks, those
    of `layers` are scored, or of all.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        kinds: Sequence[str],
        sampling: Sampling,
        temperature: float,
        ridges: LossRidges,
        scaling: Scaling,
        layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.sampling = sampling
        self.calibration_images = sampling.images
        self.temperature = temperature
        self.ridges = ridges
        self.scaling = scaling
        self.settings: dict[str, object] = {
            "kinds": [*kinds],
            "sampling": asdict(sampling),
            "temperature": temperature,
            "ridges": asdict(ridges),
            "scaling": asdict(scaling),
            **({} if layers is None else {"layers": [*layers]}),
        }
        self.parts = parts_of(net, kinds, layers)
        self.passes = Passes(
            net,
            self.parts,
            sampling=sampling,
            temperature=temperature,
            kept_images=scaling.images,
        )
        self.epochs = self.passes.epochs
        self.shares = self.passes.shares
        for name in result_names(self.parts):
            self.register_buffer(key_of(name), torch.empty(0))

    @property
    def statistics(self) -> Statistics:
        """The sums over images."""
        return self.passes.statistics

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Take in a batch of images (B, C, H, W)."""
        self.observe(batch[0], self.current_epoch)

    def observe(self, images: Tensor, epoch: int = 0) -> None:
        """Do `training_step` without a Trainer.

        Raises:
            MomentsError: activations or gradients are not finite; the layer is named.
        """
        self.passes.observe(images, epoch)

    def on_train_end(self) -> None:
        """Predict losses and scale them by measured ones."""
        if int(self.statistics.images):
            self.conclude()

    @torch.no_grad()
    def conclude(self) -> None:
        """Do `on_train_end` without a Trainer."""
        passes = self.passes
        passes.finish()
        prediction = predict(
            self.net, self.parts, passes.statistics, ridges=self.ridges, unit=passes.unit
        )
        probes = probes_of(
            self.net, self.parts, passes.statistics, prediction, self.scaling, self.ridges
        )
        measured = passes.measure(probes)
        found = results(
            self.net,
            self.parts,
            self.statistics,
            prediction,
            [*zip(probes, measured, strict=True)],
            self.ridges,
        )
        for name, value in found.items():
            self.register_buffer(key_of(name), value.cpu().contiguous())

    def evidence(self) -> Evidence:
        """Return the losses and what edits need; empty where no image was seen."""
        known = {name: self.get_buffer(key_of(name)) for name in result_names(self.parts)}
        if not any(value.numel() for value in known.values()):
            return Evidence()
        scores: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {}
        for name, value in known.items():
            owner, _, statistic = name.rpartition(".")
            if statistic == "losses":
                scores[owner] = value
            else:
                moments.setdefault(owner, {})[statistic] = value
        return Evidence(scores=scores, moments=moments)

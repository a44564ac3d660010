"""The scorer of predicted losses: statistics in one pass, then losses, scaled by measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, full_precision, key_of
from vitrim.network.structure import Attention
from vitrim.plan import Evidence
from vitrim.sensitivity.curvature import directions, visible_attention, whitened
from vitrim.sensitivity.parts import parts_of
from vitrim.sensitivity.predict import predict, probes_of
from vitrim.sensitivity.probes import feature_divergence, kl_divergence, measure
from vitrim.sensitivity.results import result_names, results
from vitrim.sensitivity.settings import LossRidges, Scaling
from vitrim.sensitivity.statistics import Statistics
from vitrim.trainer.calibrate import Sampling, capture, classifiers
from vitrim.trainer.phase import ResumePoint

_CHUNK = 16  # images of one backward pass, whose attention maps are in memory together


class LossScorer(LightningModule):
    """Pass calibration images through a network and back once; then predict and measure losses.

    Evidence has `scores`: what removing each unit, direction or component costs, in nats of the KL
    divergence (at `temperature`) from the dense network's decision, by site or layer. `moments`
    has, by layer, `cov` and `mean` of the inputs of those that read units; by query-key or value
    site `rows` and `columns` (heads, K, K), the bases of its directions; and under `network` the
    losses of whole branches and of int8, and the measurements (`probe_table`). Networks without a
    classifier see their images twice: first for the covariance of the features.
    """

    resumes_at: ResumePoint = "never"
    clip_norm = 0.0
    trains = False

    def __init__(
        self,
        net: nn.Module,
        *,
        kinds: Sequence[str],
        sampling: Sampling,
        temperature: float,
        ridges: LossRidges,
        scaling: Scaling,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
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
        }
        self.parts = parts_of(net, kinds)
        statistics = Statistics(net, self.parts, sampling)
        self._statistics = [statistics]  # in a list: sums are not saved, results are
        self.has_classifier = any(True for _ in classifiers(net))
        self.epochs = 1 if self.has_classifier else 2
        width = 1 if self.has_classifier else int(net.num_features)  # type: ignore[arg-type]
        self._features = Moments("features", width)
        self._images: list[Tensor] = []
        for name in result_names(self.parts):
            self.register_buffer(key_of(name), torch.empty(0))

    @property
    def statistics(self) -> Statistics:
        """The sums over images."""
        return self._statistics[0]

    def on_train_start(self) -> None:
        """Run the network in evaluation mode."""
        self.net.eval()

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Take in a batch of images (B, C, H, W)."""
        self.observe(batch[0], self.current_epoch)

    def observe(self, images: Tensor, epoch: int = 0) -> None:
        """Do `training_step` without a Trainer.

        Raises:
            MomentsError: activations or gradients are not finite; the layer is named.
        """
        with full_precision(images):
            if epoch + 1 < self.epochs:
                with torch.no_grad():
                    features = self.net(images)
                self._features.add(features, torch.ones(len(features), device=features.device))
                return
            for chunk in torch.split(images, _CHUNK):
                self._backward(chunk)
        missing = self.scaling.images - sum(map(len, self._images))
        if missing > 0:
            self._images.append(images[:missing])

    def _backward(self, images: Tensor) -> None:
        readers, attentions = self.parts.readers, self.parts.attentions
        outputs = [(reader.name, True) for reader in readers]
        outputs += [(attention.qkv, True) for attention in attentions]
        with (
            torch.enable_grad(),
            visible_attention(self.net, [attention.branch for attention in attentions]),
            capture(self.net, [(reader.name, False) for reader in readers]) as input_of,
            capture(self.net, outputs) as output_of,
            maps_of(self.net, attentions) as maps,
        ):
            logits = self.net(images)
        wanted = [output_of[reader.name] for reader in readers]
        wanted += [one for attention in attentions for one in maps[attention.branch]]
        along = (logits * self._directions(logits)).sum()
        gradients = iter(torch.autograd.grad(along, wanted))
        for reader in readers:
            self.statistics.add_layer(reader, input_of[reader.name], next(gradients))
        for attention in attentions:
            of_maps = maps[attention.branch]
            self.statistics.add_attention(
                attention, output_of[attention.qkv], of_maps, [next(gradients) for _ in of_maps]
            )
        self.statistics.images += len(images)

    def _directions(self, logits: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(self.statistics.images))
        if self.has_classifier:
            return directions(logits, self.temperature, generator)
        return whitened(logits, self._inverse_root, generator)

    @cached_property
    def _inverse_root(self) -> Tensor:
        """F^(-1/2) of the covariance of the features, with a hundredth of its mean added."""
        self._features.finish()
        cov = self._features.cov.double()
        values, vectors = torch.linalg.eigh(cov)
        floor = 0.01 * float(cov.diagonal().mean())
        root: Tensor = (vectors / (values.clamp_min(0.0) + (floor or 1.0)).sqrt()) @ vectors.mT
        return root

    def on_train_end(self) -> None:
        """Predict losses and scale them by measured ones."""
        if int(self.statistics.images):
            self.conclude()

    @torch.no_grad()
    def conclude(self) -> None:
        """Do `on_train_end` without a Trainer."""
        self.statistics.finish()
        unit = 1 / (2 * self.temperature**2) if self.has_classifier else 0.5
        prediction = predict(self.net, self.parts, self.statistics, ridges=self.ridges, unit=unit)
        probes = probes_of(
            self.net, self.parts, self.statistics, prediction, self.scaling, self.ridges
        )
        measured: list[float] = []
        if probes:
            images = torch.cat(self._images)
            divergence = (
                kl_divergence(self.temperature)
                if self.has_classifier
                else feature_divergence(self._inverse_root)
            )
            with full_precision(images):
                measured = measure(self.net, images, probes, divergence)
        self._images = []
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


@contextmanager
def maps_of(net: nn.Module, attentions: Sequence[Attention]) -> Iterator[dict[str, list[Tensor]]]:
    """Yield a dict that gets the attention maps of each attention, one for each run of heads."""
    found: dict[str, list[Tensor]] = {attention.branch: [] for attention in attentions}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, out: found[name].append(out)

    with ExitStack() as stack:
        for name in found:
            module = net.get_submodule(f"{name}.attn_drop")
            stack.callback(module.register_forward_hook(hook_for(name)).remove)
        yield found

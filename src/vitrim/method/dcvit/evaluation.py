"""Evaluation of trials: the distance of compressed networks to the dense one on the judging set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.data.loader import ResumableLoader
from vitrim.method.dcvit.synthetic import PixelRange, SyntheticImages
from vitrim.network import stream
from vitrim.network.stream import BranchStep, Stream

Distance = Literal["kl", "mse"]


class Evaluation:
    """Distance to the dense network over a set of images, a mean over them.

    Args:
        dense: in eval mode.
        batches: images, (B, C, H, W) each.
        distance: kl of the probabilities from the dense network's, or mse of the features.
    """

    @torch.no_grad()
    def __init__(self, dense: nn.Module, batches: Sequence[Tensor], distance: Distance) -> None:
        self.batches = batches
        self.distance = distance
        self.references = [self._output(dense, features_of(dense, images)) for images in batches]

    @torch.no_grad()
    def of_network(self, net: nn.Module) -> Tensor:
        """Return the distance of `net`, which is set to eval mode."""
        net.eval()
        return self._mean(self._output(net, features_of(net, images)) for images in self.batches)

    @torch.no_grad()
    def of_streams(self, net: nn.Module, streams: Sequence[Tensor], first: int) -> Tensor:
        """Return the distance of `net`, given its streams before the step at position `first`."""
        net.eval()
        rest = stream(net)
        return self._mean(self._output(net, rest.features(net, x, first)) for x in streams)

    def _output(self, net: nn.Module, features: Tensor) -> Tensor:
        """Return what is compared: log-probabilities (B, classes), or the features."""
        if self.distance == "kl":
            logits: Tensor = net.forward_head(features)  # type: ignore[operator]
            return logits.log_softmax(-1)
        return features

    def _mean(self, outputs: Iterable[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for output, reference in zip(outputs, self.references, strict=True):
            if self.distance == "kl":
                total += F.kl_div(output, reference, log_target=True, reduction="sum").cpu()
            else:
                total += len(output) * F.mse_loss(output, reference).cpu()
        return total / sum(map(len, self.batches))


class JudgingSet:
    """The images that trials are evaluated on: calibration images, or synthetic ones.

    Args:
        synthetic: how images are made; None: the calibration images themselves.
        distance: see `Evaluation`.
        seed: of synthetic images.
    """

    def __init__(self, synthetic: SyntheticImages | None, distance: Distance, *, seed: int) -> None:
        self.synthetic = synthetic
        self.distance: Distance = distance
        self.seed = seed
        self._images: list[Tensor] = []
        self._pixels: PixelRange | None = None
        self._evaluation: Evaluation | None = None

    def add(self, images: Tensor) -> None:
        """Add a batch of calibration images (B, C, H, W); synthetic ones need their range only."""
        if self.synthetic is None:
            self._images.append(images)
            return
        pixels = PixelRange.of(images)
        self._pixels = pixels if self._pixels is None else pixels.union(self._pixels)
        self._images = self._images or [images]

    def add_missing(self, loader: object, n_batches: int, device: torch.device) -> None:
        """Add the calibration images if there are none: this process began after the first epoch.

        Args:
            loader: a `ResumableLoader`, of whose first epoch they are.
            n_batches: how many batches of it.
            device: where they go.
        """
        if self.synthetic is not None or self._images:
            return
        assert isinstance(loader, ResumableLoader)
        for batch in islice(loader.first_epoch(), n_batches):
            self.add(cast(Sequence[Tensor], batch)[0].to(device))

    def synthesise(self, dense: nn.Module) -> Tensor:
        """Return the synthetic images (n, C, H, W), or an empty tensor where there are none."""
        if self.synthetic is None or self._pixels is None:
            return torch.empty(0)
        example = self._images[0]
        height, width = example.shape[2:]
        with torch.no_grad():
            n_classes = dense(example).shape[1]
        images, _ = self.synthetic.run(
            dense,
            n_classes=n_classes,
            pixels=self._pixels,
            size=(height, width),
            seed=self.seed,
        )
        return images

    def evaluation(self, dense: nn.Module, synthetic: Tensor) -> Evaluation:
        """Return the evaluation on these images, of which `synthetic` is what was synthesised."""
        if self._evaluation is None:
            images: Sequence[Tensor] = self._images
            if self.synthetic is not None:
                images = torch.split(synthetic, self.synthetic.batch_size)
            self._evaluation = Evaluation(dense.eval(), images, self.distance)
        return self._evaluation


@torch.no_grad()
def evaluate_in_order(
    evaluation: Evaluation, dense: Stream, branches: Sequence[str], nets: Iterable[nn.Module]
) -> Iterator[Tensor]:
    """Yield the distances of networks that differ from the dense one from a branch on.

    The common beginning is run once for all of them. Its stream is kept in memory: images x tokens
    x D numbers.

    Args:
        evaluation: on the judging set.
        dense: the stream of the dense network.
        branches: by network the first branch that differs, in network order.
        nets: the networks; one is taken at a time.
    """
    steps = enumerate(dense.steps)
    positions = {step.name: position for position, step in steps if isinstance(step, BranchStep)}
    streams, position = [dense.embed(images) for images in evaluation.batches], 0
    for branch, net in zip(branches, nets, strict=True):
        first = positions[branch]
        for step in dense.steps[position:first]:
            streams = [step.advance(x) for x in streams]
        position = first
        yield evaluation.of_streams(net, streams, first)


@torch.no_grad()
def features_of(net: nn.Module, images: Tensor) -> Tensor:
    """Return the features of images (B, C, H, W), without gradients."""
    features: Tensor = net.forward_features(images)  # type: ignore[operator]
    return features

"""The scorer of low-rank methods: statistics of each Linear's inputs and of its outputs' effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, MomentsError, add_to, full_precision, key_of
from vitrim.method.mixed_rank.metric import CENTRED, Decomposition
from vitrim.method.mixed_rank.pieces import Piece
from vitrim.network import stream, structure
from vitrim.network.attention import GatheredLinear
from vitrim.network.factored import widths_of_layer
from vitrim.plan import Evidence
from vitrim.trainer.activations import Batches, capture
from vitrim.trainer.calibrate import Sampling, gather_tokens
from vitrim.trainer.shared_pass import Share, SharedPass

_MOMENTS: tuple[Decomposition, ...] = ("whitening", "normalised_output", "centred", "loss")


class Profile(SharedPass):
    """Pass calibration images through a network once and keep what a decomposition needs.

    Evidence has no scores but `moments`, by layer: `weight`, `mean` and `cov` of its inputs (for
    normalised_output every token counts 1 / ||W x||^2), `abs` E|x| for asvd, `tokens` (N, in), the
    mean over images, for mean_input. With `gradient_images` above 0 there are statistics of the
    gradients of the logits by the layer's outputs, summed over logits and tokens (by random signs)
    and averaged over that many images: `gradient_squares` (out,) by layer, and by piece
    `gradient_products`, G (out, out), or W^T G W (in, in) if that is smaller. The memory does not
    grow with the number of images.
    """

    images: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        pieces: Mapping[str, Piece],
        decomposition: Decomposition,
        sampling: Sampling,
        gradient_images: int,
    ) -> None:
        super().__init__()
        self.net = net
        layers = [*dict.fromkeys(piece.layer for piece in pieces.values())]
        self.epochs = 1 if layers else 0
        self.calibration_images = sampling.images
        self.sampling = sampling
        self.decomposition = decomposition
        self.gradient_images = gradient_images
        self.settings: dict[str, object] = {
            "pieces": {name: [*piece] for name, piece in pieces.items()},
            "decomposition": decomposition,
            "sampling": asdict(sampling),
            "gradient_images": gradient_images,
            "version": 2,  # of the state: 1 had sums where 2 has means
        }
        self._layers = layers
        self._pieces = dict(pieces) if gradient_images else {}
        self._stream = stream(net)
        branches = {branch.name: branch for branch in self._stream.branches}
        self._tokens = {
            layer.name: branches[layer.branch].tokens for layer in structure(net).layers
        }
        self.moments = nn.ModuleDict()
        for name in layers:
            if decomposition in _MOMENTS:
                width = widths_of_layer(net.get_submodule(name))[0]
                self.moments[key_of(name)] = Moments(name, width)
        statistics = {"asvd": ["abs"], "mean_input": ["tokens"]}.get(decomposition, [])
        statistics += ["gradient_squares"] if gradient_images else []
        self._sums = [f"{name}.{statistic}" for name in layers for statistic in statistics]
        self._sums += [f"{name}.gradient_products" for name in self._pieces]
        for name in self._sums:
            self.register_buffer(key_of(name), torch.empty(0))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))
        self._n_seen = 0
        self._share = Share(self, self._sums)
        self.shares = [self._share]
        self._inputs, self._outputs = (
            [(name, after) for name in layers] for after in (False, True)
        )
        self._batches = {  # by whether gradients are computed
            False: Batches(self._inputs),
            True: Batches(self._inputs, self._outputs, graph=True),
        }

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Take in one batch of images (B, C, H, W)."""
        images, n_differentiated = batch[0], max(0, self.gradient_images - self._n_seen)
        parts = ((images[:n_differentiated], True), (images[n_differentiated:], False))
        for part, differentiate in parts:
            if len(part):
                generator = torch.Generator().manual_seed(self._n_seen) if differentiate else None
                with full_precision(part):
                    for few in self._batches[differentiate].of(part, self.net):
                        taken = self._share.take(partial(self._take_in, few, generator))
                        if generator is not None and not taken:
                            _bits((len(few), *self._shape_of_logits), generator)
                        self._n_seen += len(few)

    def _take_in(self, images: Tensor, generator: torch.Generator | None) -> None:
        differentiate = generator is not None
        with (
            torch.set_grad_enabled(differentiate),
            capture(self.net, self._inputs) as input_of,
            capture(self.net, self._outputs if differentiate else []) as output_of,
        ):
            logits = self.net(images)
        self._shape_of_logits = logits.shape[1:]
        with torch.no_grad():
            self._add_inputs(input_of)
        if generator is not None:
            self._add_gradients(logits, output_of, _bits(logits.shape, generator))

    def _add_inputs(self, input_of: Mapping[str, Tensor]) -> None:
        for name in self._layers:
            linear = self.net.get_submodule(name)
            x = self._tokens[name](input_of[name])
            index = self.sampling.index(x, self._stream.n_prefix_tokens, self._n_seen)
            if isinstance(linear, GatheredLinear):
                x = x[..., linear.get_buffer("index")]
            if self.decomposition == "mean_input":
                self._add(f"{name}.tokens", x.sum(0))
            n_patches = x.shape[1] - self._stream.n_prefix_tokens
            x = gather_tokens(x, index)
            weights = self._weights(linear, x, n_patches)
            if self.decomposition == "asvd":
                normalised = weights / weights.sum(1, keepdim=True)
                self._add(f"{name}.abs", (x.abs() * normalised.unsqueeze(-1)).sum((0, 1)))
            if self.decomposition in _MOMENTS:
                moments = self.moments[key_of(name)]
                assert isinstance(moments, Moments)
                moments.add(x.flatten(0, 1), weights.flatten(), wait=True)

    def _weights(self, linear: nn.Module, x_BnC: Tensor, n_patches: int) -> Tensor:
        """Return the weight of each sampled token, (B, n).

        In the decompositions of others all tokens have the same weight, so a sampled patch also
        counts for those left out. In ours, a token that the classifier reads has the weight that
        the sampling gives it, relative to a sampled patch.
        """
        n_prefix = self._stream.n_prefix_tokens
        weights = torch.ones(x_BnC.shape[:2], device=x_BnC.device)
        if self.decomposition in CENTRED:
            weights[:, : self._stream.n_readout_tokens] = self.sampling.class_token_weight
            return weights
        weights[:, n_prefix:] = n_patches / max(1, weights.shape[1] - n_prefix)
        if self.decomposition == "normalised_output":
            outputs = x_BnC @ linear.get_parameter("weight").mT
            weights = weights / outputs.square().sum(-1).clamp_min(1e-12)
        return weights

    def _add_gradients(self, logits: Tensor, output_of: Mapping[str, Tensor], bits: Tensor) -> None:
        """Add up products of the logits' gradients, by random signs (Hutchinson's estimator)."""
        signs = bits.to(logits) * 2 - 1
        outputs = [output_of[name] for name in self._layers]
        by_layer = zip(
            self._layers, torch.autograd.grad((logits * signs).sum(), outputs), strict=True
        )
        gradients = {name: gradient.flatten(0, -2) for name, gradient in by_layer}
        for name, gradient in gradients.items():
            self._add(f"{name}.gradient_squares", gradient.square().sum(0))
        for name, piece in self._pieces.items():
            rows = gradients[piece.layer][:, piece.start : piece.start + piece.rows]
            if piece.rows > piece.columns:
                rows = rows @ piece.weight_in(self.net)
            self._add(f"{name}.gradient_products", rows.mT @ rows)

    def _add(self, name: str, part: Tensor) -> None:
        if not bool(torch.isfinite(part).all()):
            raise MomentsError(f"{name}: not finite on a batch; check the images and the weights")
        add_to(self, name, part)

    def on_train_end(self) -> None:
        """Sum over the processes, divide by the number of images, and finish the moments."""
        self._share.reduce()
        n_differentiated = min(self._n_seen, self.gradient_images)
        for name in self._sums:
            by_gradient = name.rpartition(".")[2].startswith("gradient_")
            self.get_buffer(key_of(name)).div_(n_differentiated if by_gradient else self._n_seen)
        for moments in self.moments.values():
            assert isinstance(moments, Moments)
            moments.finish()
        self.images.fill_(self._n_seen)

    def evidence(self) -> Evidence:
        """Return what was gathered; empty where no image was seen."""
        gathered: dict[str, dict[str, Tensor]] = {}
        for name in self._sums if int(self.images) else ():
            of, _, statistic = name.rpartition(".")
            gathered.setdefault(of, {})[statistic] = self.get_buffer(key_of(name)).cpu()
        for moments in self.moments.values() if int(self.images) else ():
            assert isinstance(moments, Moments)
            gathered.setdefault(moments.name, {}).update(moments.tensors())
        return Evidence(moments=gathered)


def _bits(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return random bits, of which those of one image after the other are drawn."""
    return torch.randint(0, 2, shape, generator=generator)

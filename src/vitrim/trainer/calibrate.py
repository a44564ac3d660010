"""The scorer that trains nothing: one pass over images, and moments of what flows by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from vitrim.closed_form.importance import reader_of
from vitrim.closed_form.moments import Moments, add_to, key_of
from vitrim.errors import is_count, is_positive, require
from vitrim.network import stream, structure
from vitrim.network.structure import Attention, Layer, Structure
from vitrim.plan import Evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Which images, and which of their tokens, statistics are made of.

    `images` are drawn from the training set by the run's seed, without augmentation; all of it if
    it has fewer. Of an image, the class token and up to `tokens` patches evenly spaced, from
    another start in every image (None: all); where only `given` images are there, as many times
    more of each as they are fewer, so that least squares has enough to go by. Where the classifier
    reads a class token, it counts as `readout` patches. Regressions, and the moments of one-shot
    pruning, count a patch by the inverse variance of its stream, so that a few tokens of huge norm
    do not outweigh all others.
    """

    images: int
    tokens: int | None
    readout: float
    given: int | None = None

    def __post_init__(self) -> None:
        for rule in (
            ("images", is_count(self.images), "a whole number from 1 on"),
            ("tokens", self.tokens is None or is_count(self.tokens), "null or a whole number"),
            ("readout", is_positive(self.readout), "a number above 0"),
        ):
            require("method.sampling", self, rule)

    @property
    def each(self) -> int | None:
        """How many patches of an image are sampled at most, None: all.

        >>> Sampling(images=1000, tokens=48, readout=4.0, given=500).each
        96
        """
        if self.tokens is None or self.given is None:
            return self.tokens
        return self.tokens * max(1, self.images // self.given)

    def index(self, x: Tensor, prefix: int, seen: int) -> Tensor:
        """Return which tokens of x are sampled, (B, n); `seen` images came before these."""
        patches = x.shape[1:-1].numel() - prefix
        stride = 1 if self.each is None else max(1, patches // min(self.each, patches))
        image = seen + torch.arange(len(x), device=x.device)
        spaced = torch.arange(patches // stride, device=image.device) * stride
        first = torch.arange(prefix, device=image.device).expand(len(image), -1)
        return torch.cat([first, prefix + spaced + (image % stride)[:, None]], dim=1)

    def weights(self, x_BnD: Tensor, prefix: int, readout: int) -> Tensor:
        """Return what each sampled token counts, (B, n); the classifier reads the first ones."""
        weights = 1 / x_BnD.float().var(-1).clamp_min(1e-12)
        weights = weights / weights[:, prefix:].mean(1, keepdim=True)
        weights[:, :prefix] = 1.0
        weights[:, :readout] = self.readout
        return weights


def take(x: Tensor, index_Bn: Tensor) -> Tensor:
    """Return the indexed tokens of x, (B, N, C) or (B, H, W, C), as (B, n, C)."""
    x_BNC = x.flatten(1, -2)
    starts = torch.arange(len(x), device=x.device)[:, None] * x_BNC.shape[1]
    rows = x_BNC.flatten(0, 1).index_select(0, (starts + index_Bn).flatten())
    return rows.view(*index_Bn.shape, -1)


class Calibrate(LightningModule):
    """Pass calibration images through a network once and keep moments of what its units do.

    Evidence has no scores, those are the criterion's, but `moments`: by layer that reads units
    `weight`, `mean` and `cov` of its inputs; by query-key site the same of q and k, per head. With
    `taylor` also each unit's first-order effect on the loss against the network's own decision;
    with `targets` what a later regression aims at: the stream after the branch of each layer that
    reads hidden units, at the sampled tokens, and the classifier's input. Moments take the same
    memory whatever the number of images; targets take images x sampled tokens x D numbers a layer.
    """

    resumes_at = "never"

    def __init__(
        self,
        net: nn.Module,
        *,
        sites: Sequence[str],
        sampling: Sampling,
        taylor: bool,
        targets: bool,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.epochs = 1 if sites else 0  # there may be nothing to look for
        self.samples = sampling.images
        self.sampling = sampling
        self.taylor = taylor
        self.targets = targets
        self.settings: dict[str, Any] = {
            "sites": list(sites),
            "sampling": asdict(sampling),
            "taylor": taylor,
            "targets": targets,
        }
        described = structure(net)
        if sites:  # weights alone can be judged without a stream
            self._stream = stream(net)
            self._branches = {branch.name: branch for branch in self._stream.branches}
        self._readers, self._attentions = _watched(described, sites)
        self._dims = {a.qkv: described.sites[a.qk].head_dims for a in self._attentions}
        self.moments = nn.ModuleDict()
        for layer in self._readers:
            width: int = net.get_submodule(layer.name).in_features  # type: ignore[assignment]
            self.moments[key_of(layer.name)] = Moments(layer.name, width)
        for attention in self._attentions:
            dims = self._dims[attention.qkv]
            for part in ("q", "k"):
                name = f"{attention.qk}.{part}"
                self.moments[key_of(name)] = Moments(name, max(dims), (len(dims),))
        self._classifiers = [name for name, module in classifiers(net)] if targets else []
        self._aimed = {
            layer.name for layer in self._readers if targets and not _reads_heads(described, layer)
        }
        self._chunks: dict[str, list[Tensor]] = {}
        for name in self._extras():
            self.register_buffer(key_of(name), torch.empty(0))
        self._seen = 0

    def _extras(self) -> list[str]:
        """Return the names of what is kept beside moments."""
        readers = [layer.name for layer in self._readers]
        aimed = [name for name in readers if name in self._aimed]
        aims = [f"{name}.target" for name in (*aimed, *self._classifiers)]
        units = [*readers, *(attention.qk for attention in self._attentions)]
        return [*aims, *(f"{name}.taylor" for name in units if self.taylor)]

    def on_train_start(self) -> None:
        """Look at the network as it is used."""
        self.net.eval()

    def configure_optimizers(self) -> None:
        """Return none: nothing is trained."""

    def training_step(self, batch: Any, batch_index: int) -> None:
        """Take in one batch of images (B, C, H, W)."""
        images = batch[0]
        with full_precision(images), watch(self.net, self._places()) as flows:
            with torch.set_grad_enabled(self.taylor):
                logits = self.net(images)
            if self.taylor:
                self._first_order(logits, flows)
        with torch.no_grad():
            self._take_in(flows)
        self._seen += len(images)

    def _places(self) -> list[tuple[str, bool]]:
        """Return the modules to watch, and whether their output is meant or their input."""
        norms = [step.before for step in self._stream.steps]
        readers = [layer.name for layer in self._readers]
        wanted = [*norms, self._stream.after, *readers, *self._classifiers]
        return [*((name, False) for name in wanted), *((a.qkv, True) for a in self._attentions)]

    def _take_in(self, flows: Mapping[str, Tensor]) -> None:
        for layer in self._readers:
            branch = self._branches[layer.branch]
            index, weights = self._sampled(flows[branch.before])
            rows = take(branch.tokens(flows[layer.name]), index)
            self._moments(layer.name).add(rows.flatten(0, 1), weights.flatten())
            if layer.name in self._aimed:
                after = take(flows[self._stream.following(branch)], index)
                self._chunks.setdefault(f"{layer.name}.target", []).append(after.float().cpu())
        for attention in self._attentions:
            branch = self._branches[attention.branch]
            index, weights = self._sampled(flows[branch.before])
            dims = self._dims[attention.qkv]
            outputs = take(branch.tokens(flows[attention.qkv]), index)
            both = outputs.flatten(0, 1)[:, : 2 * sum(dims)]
            for part, rows in zip(("q", "k"), both.chunk(2, dim=1), strict=True):
                self._moments(f"{attention.qk}.{part}").add(_by_head(rows, dims), weights.flatten())
        for name in self._classifiers:
            features = flows[name].float().cpu()
            self._chunks.setdefault(f"{name}.target", []).append(features)

    def _sampled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens of the stream x count, and how much, (B, n) each."""
        index = self.sampling.index(x, self._stream.prefix, self._seen)
        taken = take(x, index)
        return index, self.sampling.weights(taken, self._stream.prefix, self._stream.readout)

    def _moments(self, name: str) -> Moments:
        found = self.moments[key_of(name)]
        assert isinstance(found, Moments)
        return found

    def _first_order(self, logits: Tensor, flows: Mapping[str, Tensor]) -> None:
        """Add up |sum over tokens of x dL/dx| per unit, L the loss of the network's own choice."""
        loss = F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
        names = [*(layer.name for layer in self._readers), *(a.qkv for a in self._attentions)]
        slopes = torch.autograd.grad(loss, [flows[name] for name in names])
        keys = [*(layer.name for layer in self._readers), *(a.qk for a in self._attentions)]
        inside = [layer.branch for layer in self._readers] + [a.branch for a in self._attentions]
        for name, key, branch, slope in zip(names, keys, inside, slopes, strict=True):
            effects = self._branches[branch].tokens(flows[name].detach() * slope)
            effect = effects.sum(1).abs().sum(0)
            if name in self._dims:
                effect = effect[: sum(self._dims[name])]
            add_to(self, f"{key}.taylor", effect)

    def on_train_end(self) -> None:
        """Bring sums into their final form."""
        for moments in self.moments.values():
            assert isinstance(moments, Moments)
            moments.finish()
        for name, chunks in self._chunks.items():
            self.register_buffer(key_of(name), torch.cat(chunks))
        self._chunks = {}

    def evidence(self) -> Evidence:
        """Return the moments; empty where no image was seen."""
        if not all(moments.get_buffer("cov").numel() for moments in self.moments.values()):
            return Evidence(scores={})
        found: dict[str, dict[str, Tensor]] = {
            layer.name: self._moments(layer.name).tensors() for layer in self._readers
        }
        for attention in self._attentions:
            found[attention.qk] = {
                f"{part}.{name}": tensor
                for part in ("q", "k")
                for name, tensor in self._moments(f"{attention.qk}.{part}").tensors().items()
            }
        for name in self._extras():
            owner, _, what = name.rpartition(".")
            found.setdefault(owner, {})[what] = self.get_buffer(key_of(name))
        return Evidence(scores={}, moments=found)


def _watched(described: Structure, sites: Sequence[str]) -> tuple[list[Layer], list[Attention]]:
    """Return the layers that read the units of `sites`, and the attentions whose qk dims are."""
    values = {attention.heads: attention.v for attention in described.attentions}
    by_qk = {attention.qk: attention for attention in described.attentions}
    names = dict.fromkeys(values.get(site, site) for site in sites if site not in by_qk)
    readers = [reader_of(described, name) for name in names]
    return readers, [by_qk[site] for site in sites if site in by_qk]


def _reads_heads(described: Structure, layer: Layer) -> bool:
    """Whether the units that `layer` reads are dims of attention heads."""
    sites = [described.sites[part.site] for part in layer.inp if part.site is not None]
    return any(site.head_dims for site in sites)


def classifiers(net: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Iterate over the Linear layers that make the logits, with their module paths."""
    found: Any = net.get_classifier()  # type: ignore[operator]
    heads = found if isinstance(found, tuple) else (found,)
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and any(module is head for head in heads):
            yield name, module


def full_precision(images: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast: statistics are not made of rounded numbers."""
    return torch.autocast(images.device.type, enabled=False)


def _by_head(rows: Tensor, dims: Sequence[int]) -> Tensor:
    """Return rows (n, sum of dims) as (heads, n, widest), narrow heads filled up with zeros."""
    widest = max(dims)
    return torch.stack(
        [F.pad(part, (0, widest - part.shape[1])) for part in torch.split(rows, list(dims), dim=1)]
    )


@contextmanager
def watch(net: nn.Module, places: Sequence[tuple[str, bool]]) -> Iterator[dict[str, Tensor]]:
    """Note what enters (or leaves) modules while `net` runs; of several calls, the first."""
    flows: dict[str, Tensor] = {}

    def note(name: str, *, output: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], *out: Tensor) -> None:
            flows.setdefault(name, out[0] if output else args[0])

        return hook

    handles = [
        net.get_submodule(name).register_forward_hook(note(name, output=True))
        if output
        else net.get_submodule(name).register_forward_pre_hook(note(name, output=False))
        for name, output in places
    ]
    try:
        yield flows
    finally:
        for handle in handles:
            handle.remove()

"""Second moments of inputs, of gradients, and of queries and keys: what curvature needs, summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.closed_form.moments import Moments, MomentsError, add_to, key_of
from vitrim.network.factored import widths_of_layer
from vitrim.network.structure import Attention
from vitrim.sensitivity.curvature import score_gradients
from vitrim.sensitivity.parts import Parts, Reader
from vitrim.trainer.calibrate import Sampling, gather_tokens

_LEAST = 1e-30  # weight of a row whose gradient is zero


class Statistics(nn.Module):
    """Sums over images, a batch at a time; memory does not grow with the number of images.

    With x the input of a layer at a token, g the gradient by its output there and t the number of
    tokens that the sampled one stands for, a layer has C = sum t |g|^2 x x^T (centred), G = sum t g
    g^T, or W^T G W if that is smaller, and the diagonal of G. A query-key site has, by head, Q =
    sum u q q^T and K = sum v k k^T (centred), with u and v the sums over keys and over queries of
    the squared gradients by the scores. Gradients by the scores count all tokens.

    `sums` are the names of all that is summed besides `Moments`; `images` counts those of the pass,
    among several processes also those that another one takes in.
    """

    images: Tensor

    def __init__(self, net: nn.Module, parts: Parts, sampling: Sampling) -> None:
        super().__init__()
        self._net = [net]  # in a list: no submodule
        self.sampling = sampling
        readers, attentions = parts.readers, parts.attentions
        self._dims = {a.qk: parts.described.sites[a.qk].head_dims for a in attentions}
        self.moments, self.plain = nn.ModuleDict(), nn.ModuleDict()
        for reader in readers:
            width = widths_of_layer(net.get_submodule(reader.name))[0]
            self.moments[key_of(reader.name)] = Moments(reader.name, width)
            self.plain[key_of(reader.name)] = Moments(reader.name, width)
        self.sums = [f"{r.name}.{name}" for r in readers for name in ("products", "squares")]
        self.sums += [
            f"{a.qk}.{name}" for a in attentions for name in ("q", "k", "k_sum", "weight")
        ]
        for name in self.sums:
            self.register_buffer(key_of(name), torch.empty(0))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add_layer(self, reader: Reader, inputs: Tensor, gradients: Tensor) -> None:
        """Add one layer's inputs and the gradients by its outputs, both as the layer has them.

        Raises:
            MomentsError: one of them is not finite; the message names the layer.
        """
        x, g = (reader.tokens(t.detach()) for t in (inputs, gradients))
        index = self.sampling.index(x, reader.prefix, int(self.images))
        sampled = index.shape[1] - reader.prefix
        counts = torch.ones(index.shape, device=x.device)
        counts[:, reader.prefix :] = (x.shape[1] - reader.prefix) / max(1, sampled)
        rows, slopes = (gather_tokens(t, index).flatten(0, 1).float() for t in (x, g))
        counted = slopes * counts.flatten()[:, None].sqrt()
        squares = counted.square()
        if not bool(torch.isfinite(squares).all()):
            raise MomentsError(
                f"{reader.name}: gradients by its outputs are not finite; check the images and "
                "the weights"
            )
        moments = self.moments[key_of(reader.name)]
        assert isinstance(moments, Moments)
        moments.add(rows, squares.sum(1).clamp_min(_LEAST))  # all zero: nothing depends on it
        plain = self.plain[key_of(reader.name)]
        assert isinstance(plain, Moments)
        plain.add(rows, self._plain_weights(reader, index).flatten())
        weight = self._net[0].get_submodule(reader.name).get_parameter("weight").float()
        if len(weight) > weight.shape[1]:
            counted = counted @ weight
        add_to(self, f"{reader.name}.products", counted.mT @ counted)
        add_to(self, f"{reader.name}.squares", squares.sum(0))

    def _plain_weights(self, reader: Reader, index_Bn: Tensor) -> Tensor:
        """Return the weight of each sampled token in regressions, (B, n)."""
        weights = torch.ones(index_Bn.shape, device=index_Bn.device)
        weights[:, : reader.readout] = self.sampling.class_token_weight
        return weights

    @torch.no_grad()
    def add_attention(
        self, attention: Attention, qkv: Tensor, maps: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Add one attention: the output of its qkv layer (B, N, C), and its maps.

        `maps` and the gradients by them are (B, H, N, N), one for each run of equal heads.
        """
        dims = self._dims[attention.qk]
        queries, keys = qkv.detach()[..., : 2 * sum(dims)].float().chunk(2, dim=-1)
        sums: dict[str, list[Tensor]] = {"q": [], "k": [], "k_sum": [], "weight": []}
        widest, head, column = max(dims), 0, 0
        for attn, gradient in zip(maps, gradients, strict=True):
            squares = score_gradients(attn.detach().float(), gradient.float())
            n_heads, width = attn.shape[1], dims[head]
            columns = slice(column, column + n_heads * width)
            q, k = (
                torch.unflatten(t[..., columns], -1, (n_heads, width)).movedim(-2, 1)
                for t in (queries, keys)
            )
            for name, x, weights in (("q", q, squares.sum(-1)), ("k", k, squares.sum(-2))):
                weighted = x * weights.unsqueeze(-1)
                product = torch.einsum("bhnk,bhnl->hkl", weighted, x)
                pad = widest - width
                sums[name].append(F.pad(product, (0, pad, 0, pad)))
                if name == "k":
                    sums["k_sum"].append(F.pad(weighted.sum((0, 2)), (0, pad)))
            sums["weight"].append(squares.sum((0, 2, 3)))
            head, column = head + n_heads, columns.stop
        for name, parts in sums.items():
            total = torch.cat(parts)
            if not bool(torch.isfinite(total).all()):
                raise MomentsError(
                    f"{attention.qk}: queries, keys or gradients by their products are not finite; "
                    "check the images and the weights"
                )
            add_to(self, f"{attention.qk}.{name}", total)

    def finish(self) -> None:
        """Bring the moments into their final form; safe to call twice."""
        for moments in (*self.moments.values(), *self.plain.values()):
            assert isinstance(moments, Moments)
            moments.finish()

    def regression(self, name: str) -> dict[str, Tensor]:
        """Return `cov` (in, in) and `mean` (in,) of a layer's inputs, not weighted by gradients."""
        plain = self.plain[key_of(name)]
        assert isinstance(plain, Moments)
        return plain.tensors()

    def of_layer(self, name: str) -> dict[str, Tensor]:
        """Return `cov` C (in, in) and `mean` (in,), `products` and `squares`, float64, an image.

        C + `scale` mean mean^T is not centred.

        `products` is G (out, out), or W^T G W (in, in), `squares` the diagonal of G, (out,); these
        are divided by the trace of G, so that tr(G D C D^T) is the loss of an error D in W.
        """
        moments = self.moments[key_of(name)]
        assert isinstance(moments, Moments)
        finished = moments.tensors()
        squares = self.get_buffer(key_of(f"{name}.squares")).cpu()
        products = self.get_buffer(key_of(f"{name}.products")).cpu()
        trace = float(squares.sum()) or 1.0
        scale = float(finished["weight"]) / max(1, int(self.images))
        return {
            "cov": finished["cov"].double() * scale,
            "mean": finished["mean"].double(),
            "scale": torch.tensor(scale, dtype=torch.float64),
            "products": products / trace,
            "squares": squares / trace,
        }

    def of_head(self, site: str, head: int) -> tuple[Tensor, Tensor, float]:
        """Return Q and K (K, K) of one head, float64, and the sum of the weights of an image."""
        width = self._dims[site][head]
        q, k, k_sum = (
            self.get_buffer(key_of(f"{site}.{name}"))[head].cpu() for name in ("q", "k", "k_sum")
        )
        weight = float(self.get_buffer(key_of(f"{site}.weight"))[head])
        centred = k - torch.outer(k_sum, k_sum) / (weight or 1.0)
        return q[:width, :width], centred[:width, :width], weight * max(1, int(self.images))

    def dense_width(self, attention: Attention) -> float:
        """Return what the products of queries and keys are divided by, squared."""
        scale = float(self._net[0].get_submodule(attention.branch).scale)  # type: ignore[arg-type]
        return scale**-2

"""Self-attentions of all families, described in common.

Sites of the attention at a module path (D embed, H heads, K head dim):
    attn.input   (D,)    columns of q, k and v   gathered; not where the forward pass reads the
                                                 weights without calling the layer
    attn.heads   (H,)    whole heads, with what they have of tables and biases
    attn.qk      (H*K,)  query and key rows, free in every head; locked in BEiT, EVA and Swin v2,
                         but for those of removed heads
    attn.v       (H*K,)  value rows and proj columns, free in every head
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from vitrim.network.attention import head_dims
from vitrim.network.factored import layers_of
from vitrim.network.stream import Branch
from vitrim.network.structure import Attention, Layer, Part, Site, Structure, Table, full

_BY_HAND = "its attention adds the biases of queries and values by hand"


def attention_of(
    name: str,
    attn: Any,
    *,
    fixed: str = "",
    scaled: str = "",
    tables: Mapping[str, int] | None = None,
    context: int | None = None,
) -> Structure:
    """Describe the attention at module path `name`, dense or cut.

    `fixed` and `scaled` say why query-key dims, and heads and value dims, cannot be cut exactly, if
    so. `tables` are parameters with one entry per head, and their axes; `context` is as in
    `Attention`.
    """
    qk_dims, v_dims = head_dims(attn)
    read, heads, qk, v = (f"{name}.{kind}" for kind in ("input", "heads", "qk", "v"))
    n_qk, n_v = sum(qk_dims), sum(v_dims)
    parts = {name: Part(site=name, offset=0, size=size) for name, size in ((qk, n_qk), (v, n_v))}
    projections = _projections(attn, parts[qk], parts[v])
    wide = attn.get_submodule(next(iter(projections))).in_features
    called = getattr(attn, "q_bias", None) is None
    fused = called and "qkv" in projections
    inp = (Part(site=read, offset=0, size=wide),) if called else full(wide)
    layers: list[Layer] = []
    for path, out in projections.items():
        layer = Layer(
            name=f"{name}.{path}",
            branch=name,
            out=out,
            inp=inp,
            gathers=called,
            pieces=("q", "k", "v") if fused else (),
            locked="" if called else _BY_HAND,
            beside="" if called else f"{name}.proj",
        )
        layers += layers_of(attn.get_submodule(path), layer)
    dim = full(attn.proj.out_features)
    proj = Layer(name=f"{name}.proj", branch=name, out=dim, inp=(parts[v],))
    layers += layers_of(attn.proj, proj)
    if getattr(attn, "gate", None) is not None:
        everything = full(attn.gate.in_features)
        gate = Layer(name=f"{name}.gate", branch=name, out=(parts[v],), inp=everything)
        layers += layers_of(attn.gate, gate)
    held = {"q_bias": (qk, 0), "v_bias": (v, 0)}
    held |= {table: (heads, axis) for table, axis in (tables or {}).items()}
    sites = (
        *((Site(name=read, size=wide),) if called else ()),
        Site(name=heads, size=len(v_dims), locked=scaled),
        Site(name=qk, size=n_qk, head_dims=qk_dims, locked=fixed),
        Site(name=v, size=n_v, head_dims=v_dims, locked=scaled),
    )
    return Structure(
        sites={site.name: site for site in sites},
        layers=tuple(layers),
        attentions=(
            Attention(
                branch=name,
                qkv=f"{name}.qkv" if fused else proj.name,
                heads=heads,
                qk=qk,
                v=v,
                context=context,
            ),
        ),
        tables=tuple(
            Table(name=f"{name}.{table}", branch=name, site=site, axis=axis)
            for table, (site, axis) in held.items()
            if getattr(attn, table, None) is not None
        ),
    )


def steps_of(name: str, block: Any, **given: Tensor | None) -> tuple[Branch, Branch]:
    """Return how the stream runs through the pre-norm block at module path `name`.

    Its layer scales, if any, are gamma_1 and gamma_2; `given` goes to the attention.
    """

    def step(kind: str, place: int, inner: Callable[[Tensor], Tensor]) -> Branch:
        norm, gamma = block.get_submodule(f"norm{place}"), getattr(block, f"gamma_{place}")
        return Branch(
            name=f"{name}.{kind}",
            before=f"{name}.norm{place}",
            apply=lambda x: inner(norm(x)) * (1.0 if gamma is None else gamma),
            scale=None if gamma is None else gamma.detach(),
            tokens=lambda x: x,
        )

    return step("attn", 1, lambda x: block.attn(x, **given)), step("mlp", 2, block.mlp)


def _projections(attn: Any, qk: Part, v: Part) -> dict[str, tuple[Part, ...]]:
    """Return the layers that make queries, keys and values, and the rows of each."""
    if getattr(attn, "qkv", None) is None:
        return {"q_proj": (qk,), "k_proj": (qk,), "v_proj": (v,)}
    key, value = qk.size, 2 * qk.size
    return {
        "qkv": (
            qk,
            Part(site=qk.site, offset=key, size=qk.size),
            Part(site=v.site, offset=value, size=v.size),
        )
    }

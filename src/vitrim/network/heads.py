"""The description of self-attentions, shared by all families.

Sites of the attention at a module path (D embed, H heads, K head dim):
    attn.input   (D,)    columns of q, k and v   gathered; not where the forward pass reads the
                                                 weights without calling the layer
    attn.heads   (H,)    whole heads, with their entries of tables and biases
    attn.qk      (H*K,)  query and key rows, free in every head; locked in BEiT, EVA and Swin v2,
                         except for those of removed heads
    attn.v       (H*K,)  value rows and proj columns, free in every head
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from vitrim.network.attention import head_dims
from vitrim.network.factored import layers_of, widths_of_layer
from vitrim.network.stream import BranchStep
from vitrim.network.structure import Attention, Layer, Part, PerHeadParameter, Site, Structure, full

_ADDS_BIASES = "its attention adds the biases of queries and values itself"


def attention_of(
    name: str,
    attn: nn.Module,
    *,
    qk_locked: str = "",
    v_locked: str = "",
    per_head: Mapping[str, int] | None = None,
    context: int | None = None,
) -> Structure:
    """Describe the attention at module path `name`, dense or cut.

    Args:
        name: the module path.
        attn: the module.
        qk_locked: why query-key dims cannot be cut exactly, or empty.
        v_locked: why heads and value dims cannot be cut exactly, or empty.
        per_head: parameters with one entry per head, and the axis of the heads.
        context: see `Attention`.
    """
    parameters = dict(attn.named_parameters(recurse=False))
    calls_layer = "q_bias" not in parameters
    sites = _sites(name, attn, qk_locked=qk_locked, v_locked=v_locked, gathers=calls_layer)
    heads, qk, v = (f"{name}.{kind}" for kind in ("heads", "qk", "v"))
    axes = {"q_bias": (qk, 0), "v_bias": (v, 0)}
    axes |= {parameter: (heads, axis) for parameter, axis in (per_head or {}).items()}
    fused = calls_layer and "qkv" in dict(attn.named_children())
    return Structure(
        sites=sites,
        layers=_layers(name, attn, sites, calls_layer=calls_layer),
        attentions=(
            Attention(
                branch=name,
                qkv=f"{name}.qkv" if fused else f"{name}.proj",
                heads=heads,
                qk=qk,
                v=v,
                context=context,
            ),
        ),
        per_head_parameters=tuple(
            PerHeadParameter(name=f"{name}.{parameter}", branch=name, site=site, axis=axis)
            for parameter, (site, axis) in axes.items()
            if parameter in parameters
        ),
    )


def steps_of(
    name: str, block: nn.Module, **attn_arguments: Callable[[], Tensor | None]
) -> tuple[BranchStep, BranchStep]:
    """Return the two steps of the stream through the pre-norm block at module path `name`.

    Its layer scales, if any, are gamma_1 and gamma_2. `attn_arguments` return further arguments of
    the attention when it is called.
    """

    def step(kind: str, number: int, inner: Callable[[Tensor], Tensor]) -> BranchStep:
        norm = block.get_submodule(f"norm{number}")
        gamma = dict(block.named_parameters(recurse=False)).get(f"gamma_{number}")
        return BranchStep(
            name=f"{name}.{kind}",
            reader=f"{name}.norm{number}",
            apply=lambda x: inner(norm(x)) * (1.0 if gamma is None else gamma),
            scale=None if gamma is None else gamma.detach(),
            tokens=lambda x: x,
        )

    def attend(x: Tensor) -> Tensor:
        further = {key: argument() for key, argument in attn_arguments.items()}
        output: Tensor = block.get_submodule("attn")(x, **further)
        return output

    return step("attn", 1, attend), step("mlp", 2, block.get_submodule("mlp"))


def _sites(
    name: str, attn: nn.Module, *, qk_locked: str, v_locked: str, gathers: bool
) -> dict[str, Site]:
    qk_dims, v_dims = head_dims(attn)
    qk_size, v_size = sum(qk_dims), sum(v_dims)
    sites = [
        Site(name=f"{name}.heads", kind="heads", size=len(v_dims), locked_reason=v_locked),
        Site(
            name=f"{name}.qk",
            kind="qk",
            size=qk_size,
            head_dims=qk_dims,
            locked_reason=qk_locked,
        ),
        Site(name=f"{name}.v", kind="v", size=v_size, head_dims=v_dims, locked_reason=v_locked),
    ]
    if gathers:
        sites.insert(0, Site(name=f"{name}.input", kind="input", size=_input_width(attn)))
    return {site.name: site for site in sites}


def _layers(
    name: str, attn: nn.Module, sites: Mapping[str, Site], *, calls_layer: bool
) -> tuple[Layer, ...]:
    """Return the projections to queries, keys and values, the output projection, and the gate."""
    qk, v = (
        Part(site=site.name, offset=0, size=site.size)
        for site in (sites[f"{name}.qk"], sites[f"{name}.v"])
    )
    wide = _input_width(attn)
    inp = (Part(site=f"{name}.input", offset=0, size=wide),) if calls_layer else full(wide)
    modules = dict(attn.named_children())
    layers = [
        Layer(
            name=f"{name}.{path}",
            branch=name,
            out=out,
            inp=inp,
            gathers=calls_layer,
            pieces=("q", "k", "v") if calls_layer and path == "qkv" else (),
            locked_reason="" if calls_layer else _ADDS_BIASES,
            positions_from="" if calls_layer else f"{name}.proj",
        )
        for path, out in _projections(attn, qk, v).items()
    ]
    embed = full(widths_of_layer(modules["proj"])[1])
    layers.append(Layer(name=f"{name}.proj", branch=name, out=embed, inp=(v,)))
    if "gate" in modules:
        embed = full(widths_of_layer(modules["gate"])[0])
        layers.append(Layer(name=f"{name}.gate", branch=name, out=(v,), inp=embed))
    return tuple(
        inner
        for layer in layers
        for inner in layers_of(modules[layer.name.removeprefix(f"{name}.")], layer)
    )


def _projections(attn: nn.Module, qk: Part, v: Part) -> dict[str, tuple[Part, ...]]:
    """Return the layers that make queries, keys and values, and the rows of each."""
    if "qkv" not in dict(attn.named_children()):
        return {"q_proj": (qk,), "k_proj": (qk,), "v_proj": (v,)}
    k = Part(site=qk.site, offset=qk.size, size=qk.size)
    return {"qkv": (qk, k, Part(site=v.site, offset=2 * qk.size, size=v.size))}


def _input_width(attn: nn.Module) -> int:
    """Return the number of columns of the layers that make queries, keys and values."""
    modules = dict(attn.named_children())
    return widths_of_layer(modules["qkv" if "qkv" in modules else "q_proj"])[0]

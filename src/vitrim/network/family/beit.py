"""BEiT and BEiT v2 of timm: `Beit`, whose attention has a bias per relative position.

The sites of attentions are described in `vitrim.network.heads`, those of MLPs in
`vitrim.network.mlp`. Annotations are evaluated here, because TorchScript reads no strings.
"""

import torch
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from vitrim.network.attention import sliced, take_over, with_biases
from vitrim.network.dispatch import UnsupportedArchitecture, stream, structure
from vitrim.network.head_runs import SlicedHeads, heads_from
from vitrim.network.heads import attention_of, steps_of
from vitrim.network.mlp import mlp_of
from vitrim.network.stream import Stream
from vitrim.network.structure import Structure, joined


class SlicedBeitAttention(SlicedHeads, Attention):  # type: ignore[misc]
    """timm's attention after a cut: every head has its own value width."""

    def __init__(
        self, dense: Attention, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]
    ) -> None:
        nn.Module.__init__(self)
        self.scale: float = dense.scale
        self.set_widths(qk_dims, v_dims)
        self.fused_attn: bool = dense.fused_attn
        self.window_size = dense.window_size
        self.q_bias, self.k_bias, self.v_bias = dense.q_bias, None, dense.v_bias
        self.relative_position_bias_table = dense.relative_position_bias_table
        self.register_buffer(
            "relative_position_index", dense.relative_position_index, persistent=False
        )
        take_over(self, dense)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Map (B, N, D) to (B, N, D); a shared bias has all heads, (1, heads, N, N)."""
        bias_1HNN = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own_1HNN = self._get_rel_pos_bias()
            bias_1HNN = own_1HNN if bias_1HNN is None else own_1HNN + bias_1HNN
        qkv_BNC = with_biases(self.qkv(x), self.q_bias, self.v_bias)
        q_BNQ, k_BNQ, v_BNV = torch.split(self.spread(qkv_BNC), self.qkv_sizes, dim=-1)
        outputs = []
        for first, h, qk, k, v, w in self.head_runs:
            q_BHNK = heads_from(q_BNQ, qk, h, k)
            k_BHNK = heads_from(k_BNQ, qk, h, k)
            v_BHNW = heads_from(v_BNV, v, h, w)
            run_1HNN = None if bias_1HNN is None else bias_1HNN[..., first : first + h, :, :]
            out_BHNW = self.attended(q_BHNK, k_BHNK, v_BHNW, run_1HNN, False, k, w)
            outputs.append(out_BHNW.transpose(1, 2).flatten(2))
        out_BND: Tensor = self.proj_drop(self.proj(self.gathered(outputs)))
        return out_BND


@sliced.register(Attention)
def _(attn: nn.Module, *, qk_dims: tuple[int, ...], v_dims: tuple[int, ...]) -> SlicedBeitAttention:
    return SlicedBeitAttention(attn, qk_dims=qk_dims, v_dims=v_dims)


@structure.register
def _(net: Beit) -> Structure:
    parts = []
    for index, block in enumerate(net.blocks):
        name = f"blocks.{index}"
        if type(block) is not Block or type(block.attn) not in (Attention, SlicedBeitAttention):
            raise UnsupportedArchitecture(
                f"{type(net).__name__} with {type(block).__name__} and "
                f"{type(getattr(block, 'attn', None)).__name__} cannot be cut; "
                "supported: Block with Attention"
            )
        parts += [
            attention_of(
                f"{name}.attn",
                block.attn,
                qk_locked="biases of queries are not part of a layer",
                v_locked="" if net.rel_pos_bias is None else "all blocks share one position bias",
                per_head={"relative_position_bias_table": 1},
            ),
            mlp_of(f"{name}.mlp", block.mlp),
        ]
    return joined(parts)


@stream.register
def _(net: Beit) -> Stream:
    shared_bias = None if net.rel_pos_bias is None else net.rel_pos_bias()

    def embed(images: Tensor) -> Tensor:
        patches = net.patch_embed(images)
        x_BND = torch.cat([net.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        embedded: Tensor = net.pos_drop(x_BND if net.pos_embed is None else x_BND + net.pos_embed)
        return embedded

    return Stream(
        embed=embed,
        steps=tuple(
            step
            for index, block in enumerate(net.blocks)
            for step in steps_of(f"blocks.{index}", block, shared_rel_pos_bias=lambda: shared_bias)
        ),
        final_norm="norm",
        n_prefix_tokens=net.num_prefix_tokens,
        n_readout_tokens=int(net.global_pool == "token"),
        norm_is_features=True,
    )

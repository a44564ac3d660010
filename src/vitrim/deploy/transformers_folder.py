"""A compact ViT as a folder that transformers loads, without code of vitrim or of the folder.

transformers' ViT has one number of heads, one width of heads and one of MLPs for all blocks: the
compact network needs the same. Other networks are for --format timm or hf.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitrim.deploy.saved import SavedNetwork
from vitrim.errors import VitrimError
from vitrim.files import WEIGHTS
from vitrim.network.attention import head_dims

_RULES = (
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.", r"vit.encoder.layer.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
)
_KNOWN = re.compile(
    r"cls_token|pos_embed|(patch_embed\.proj|norm|head)\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}


class TransformersError(VitrimError):
    """A network that is not a ViT of transformers."""


def write_folder(saved: SavedNetwork, folder: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json.

    Raises:
        TransformersError: the network is no plain ViT with even widths.
    """
    state, config = _converted(saved.net)
    images = saved.images
    names = saved.classes or [f"LABEL_{at}" for at in range(int(config.pop("num_labels")))]
    labels = {str(at): name for at, name in enumerate(names)}
    config |= {
        "image_size": images.size[0] if images.size[0] == images.size[1] else [*images.size],
        "num_channels": images.channels,
        "id2label": labels,
        "label2id": {name: int(at) for at, name in labels.items()},
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "image_mean": [*images.mean],
        "image_std": [*images.std],
        "size": {"height": images.size[0], "width": images.size[1]},
    }
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(state, {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))


def loaded(folder: Path) -> nn.Module:
    """Return the network that transformers loads from the folder."""
    from transformers import AutoModelForImageClassification, logging

    shows_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        net: nn.Module = AutoModelForImageClassification.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    finally:
        if shows_bar:
            logging.enable_progress_bar()
    return net.eval()


def _converted(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors by transformers' names, and the sizes of the config."""
    state = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    other = [name for name in state if not _KNOWN.fullmatch(name)]
    if type(net) is not VisionTransformer or other or net.global_pool != "token":
        reason = f"it has {other[0]}" if other else f"a {type(net).__name__} of another kind"
        raise _refused(f"not the layers of a plain ViT with a class token ({reason})")
    vit: Any = net
    blocks = [*vit.blocks]
    if not all(type(block) is Block for block in blocks):
        raise _refused("blocks without attention or MLP")
    hidden = _even(state, "mlp.fc1.weight", "MLPs")
    shapes = {head_dims(block.attn) for block in blocks}
    dims = {dim for shape in shapes for part in shape for dim in part}
    if len(shapes) != 1 or len(dims) != 1:
        raise _refused("heads of different widths")
    heads, head_dim = len(shapes.pop()[0]), dims.pop()
    scale = float(blocks[0].attn.scale)
    named = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                place = name.replace("attn.qkv", f"attention.attention.{part}")
                # transformers scales by the width of a head, a cut network by the dense one's
                factor = scale * head_dim**0.5 if part == "query" else 1.0
                named[_renamed(place)] = value * factor
        else:
            named[_renamed(name)] = tensor.clone().contiguous()
    return named, {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": int(vit.embed_dim),
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "intermediate_size": hidden,
        "hidden_act": _activation(blocks[0]),
        "layer_norm_eps": float(vit.norm.eps),
        "patch_size": int(vit.patch_embed.patch_size[0]),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "num_labels": len(state["head.weight"]),
    }


def _even(state: dict[str, Tensor], ending: str, what: str, axis: int = 0) -> int:
    """Return the width that a layer has in all blocks."""
    widths = {tensor.shape[axis] for name, tensor in state.items() if name.endswith(ending)}
    if len(widths) != 1:
        raise _refused(f"{what} of different widths")
    return int(widths.pop())


def _activation(block: nn.Module) -> str:
    name = type(block.mlp.act).__name__  # type: ignore[union-attr]
    if name not in _ACTIVATIONS:
        raise _refused(f"the activation {name}")
    return _ACTIVATIONS[name]


def _renamed(name: str) -> str:
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def _refused(reason: str) -> TransformersError:
    return TransformersError(
        f"--format transformers: the network has {reason}, which transformers cannot hold "
        "without code of its own: --format timm or --format hf (timm.create_model loads both)"
    )

"""What report.json says of the dense weights of a run: name, source, tag and SHA-256."""

from __future__ import annotations

import hashlib

import timm
import torch
from torch import nn

from vitrim.model.source import Timm


def describe_weights(model: Timm, net: nn.Module, *, downloaded: bool) -> dict[str, object]:
    """Return where the weights of the dense network `net` came from, and their SHA-256.

    `source` is timm (downloaded, with `tag` of the release), checkpoint (a file), trained (by the
    run, the classifier at least) or random (nothing was loaded). `name` is timm's name of the
    network, with the tag where timm's weights were downloaded. `sha256` is that of the file for a
    checkpoint, otherwise that of the tensors (`digest_of`); None for random weights.

    Args:
        model: how the network was built.
        net: the dense network.
        downloaded: whether weights were allowed to be downloaded; a run without images loads none.
    """
    source, tag, digest = "random", None, None
    name = model.name.partition(".")[0]
    if model.has_weights and not model.trained and downloaded:
        source, digest = "trained", digest_of(net)
    elif model.checkpoint is not None:
        source, digest = "checkpoint", model.fingerprint()
    elif model.pretrained and downloaded:
        source, digest, tag = "timm", digest_of(net), _tag(model.name)
    elif downloaded:
        source, digest = "trained", digest_of(net)
    full = name if tag is None else f"{name}.{tag}"
    return {"name": full, "source": source, "tag": tag, "sha256": digest}


def _tag(name: str) -> str | None:
    """Return the tag of timm's weights of this name, which a later release may change."""
    config = timm.get_pretrained_cfg(name)
    tag = None if config is None else config.tag
    return tag or None


def digest_of(net: nn.Module) -> str:
    """Return the SHA-256 of a network's tensors: of name, type, shape and bytes of each, by name.

    >>> digest_of(nn.Identity())[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()

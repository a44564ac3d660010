"""Compact networks on the Hugging Face hub: `push_to_hub` and `from_pretrained`.

A repository holds what `vitrim-export --format hf` writes. Others load it with `from_pretrained`,
or with timm: import vitrim; timm.create_model("hf-hub:USER/NAME", pretrained=True).
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, snapshot_download
from torch import nn

from vitrim.files import MANIFEST, PLAN, WEIGHTS, StoreError
from vitrim.plan import Plan
from vitrim.store import load


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload a compact network",
) -> str:
    """Upload the network in `folder`, that of a run or of `vitrim.save`, and return its address.

    The repository is made if there is none. The network is exported to a temporary folder first,
    with a model card.

    Args:
        folder: where plan.json, model.safetensors and manifest.json are.
        repo_id: USER/NAME.
        private: whether a new repository is private.
        revision: the branch; the main one by default.
        token: for the hub; by default the one that `hf auth login` stored.
        commit_message: of the upload.

    Raises:
        StoreError: `repo_id` is no name of a repository, or a file in `folder` is damaged.
        VitrimError: the network cannot be exported.
    """
    from vitrim.deploy.export import export  # needs Lightning, `from_pretrained` does not

    _check_name(repo_id)
    with TemporaryDirectory() as temporary:
        exported, _ = export(Path(folder), "hf", out=Path(temporary) / "hf")
        api = HfApi(token=token, library_name="vitrim")
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=exported,
            revision=revision,
            commit_message=commit_message,
        )
    return str(repository)


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[nn.Module, Plan]:
    """Return the compact network called `name`, in eval mode on CPU, and its plan.

    Args:
        name: USER/NAME of a repository on the hub, or a folder as for `vitrim.load`.
        revision: branch, tag or commit of the repository.
        token: for a private repository; by default the one that `hf auth login` stored.
        cache_dir: where downloaded files are kept.

    Raises:
        StoreError: there is no such folder and `name` is no name of a repository; or a file is
            missing or differs from its checksum.
    """
    if Path(name).is_dir():
        return load(name)
    _check_name(str(name))
    files = [PLAN, WEIGHTS, MANIFEST]
    return load(
        snapshot_download(
            str(name), revision=revision, token=token, cache_dir=cache_dir, allow_patterns=files
        )
    )


def _check_name(repo_id: str) -> None:
    if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", repo_id):
        raise StoreError(f"{repo_id!r}: expected an existing folder, or USER/NAME on the hub")

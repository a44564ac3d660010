"""Hub folders: what `push_to_hub` uploads is read by `from_pretrained` and by timm."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import RepoUrl

import vitrim
from compacts import compact, plan, x
from vitrim.deploy import hub
from vitrim.errors import VitrimError


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keep what would be uploaded in a folder; the hub is not asked."""
    calls: dict[str, Any] = {"folder": tmp_path / "uploaded"}

    def create_repo(self: object, repo_id: str, **options: object) -> RepoUrl:
        calls["created"] = {"repo_id": repo_id, **options}
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self: object, *, folder_path: Path, **options: object) -> None:
        calls["uploaded"] = options
        shutil.copytree(folder_path, calls["folder"])

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return calls


def test_what_is_uploaded_is_loaded_by_vitrim_and_by_timm(
    tmp_path: Path, uploads: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    vitrim.save(tmp_path / "saved", compact("vit"), plan("vit"))
    address = vitrim.push_to_hub(tmp_path / "saved", "me/small", private=True)
    assert address == "https://huggingface.co/me/small"
    assert uploads["created"] == {"repo_id": "me/small", "private": True, "exist_ok": True}
    assert uploads["uploaded"]["repo_id"] == "me/small"
    folder = uploads["folder"]
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "config.json", "manifest.json", "model.safetensors", "plan.json")
    }

    def download(repo_id: str, *, allow_patterns: list[str], **options: object) -> str:
        assert (repo_id, options["revision"]) == ("me/small", "v1")
        assert {*allow_patterns} == {"manifest.json", "model.safetensors", "plan.json"}
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    expected = compact("vit")(x("vit"))
    for net, read in (
        vitrim.from_pretrained(folder),
        vitrim.from_pretrained("me/small", revision="v1"),
    ):
        assert torch.equal(net(x("vit")), expected)
        assert read.edits == plan("vit").edits
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(net(x("vit")), expected)


@pytest.mark.parametrize("name", ["small", "a/b/c", "me/sm all", "../no-such-folder"])
def test_names_of_no_repository_are_refused_first(
    tmp_path: Path, uploads: dict[str, Any], name: str
) -> None:
    with pytest.raises(VitrimError, match="expected an existing folder, or USER/NAME"):
        vitrim.from_pretrained(name)
    with pytest.raises(VitrimError, match="expected an existing folder, or USER/NAME"):
        vitrim.push_to_hub(tmp_path, name)
    assert "created" not in uploads

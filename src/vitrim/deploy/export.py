"""The command `vitrim-export`: the compact network of a run in the formats of other programs.

    onnx      model.onnx          any number of images at once; compared in onnxruntime
    openvino  model.xml and .bin  the same, compared in OpenVINO; weights in f32, bf16 or int8
    torch     model.pt2           what torch.export.load reads
    timm      a folder            import vitrim, timm;
                                  timm.create_model("local-dir:FOLDER", pretrained=True)
    hf        the same folder     with a model card, ready for a hub

What is written is first compared with the network, then put in the place of an earlier export.
torch is imported when an export starts, not before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from vitrim.errors import VitrimError

FILES = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2", "timm": "", "hf": ""}
"""What each format's path leads to, in its folder; nothing: the folder itself."""

PRECISIONS = ("f32", "bf16", "int8")
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


class ExportError(VitrimError):
    """What cannot be exported, or came out wrong."""


def export(
    run: Path,
    to: str,
    *,
    out: Path | None = None,
    precision: str = "f32",
    image_size: int | None = None,
) -> tuple[Path, str]:
    """Write the network saved in `run` in the format `to`.

    Files of an earlier export are replaced only once all of the new ones are there.

    Returns:
        The absolute path of what was written, and what its comparison with the network found.

    Raises:
        VitrimError: `run` is no folder that vitrim saved, a package is missing, the format cannot
            hold the network, or what came out computes something else.
    """
    _check(to, precision)
    from vitrim.deploy import formats
    from vitrim.deploy.runfolder import read

    source = read(run, image_size=image_size)
    formats.check_images(source)
    folder = run / "export" / to if out is None else out
    with _staged(folder.absolute()) as part:
        try:
            match to:
                case "onnx":
                    said = formats.onnx(source, part / FILES[to])
                case "openvino":
                    said = formats.openvino(source, part / FILES[to], precision=precision)
                case "torch":
                    said = formats.torch_export(source, part / FILES[to])
                case _:
                    said = formats.timm_folder(source, part, card=to == "hf")
        except RuntimeError as error:  # what torch.export, torch.onnx and OpenVINO raise
            raise ExportError(f"--to {to} cannot write or read the network: {error}") from error
    return (folder / FILES[to]).absolute(), said


def _check(to: str, precision: str) -> None:
    """Refuse what cannot work before the network is read."""
    if precision != "f32" and to != "openvino":
        raise ExportError(f"--precision {precision}: only --to openvino has it, {to} is in f32")
    needed = [*_PACKAGES.get(to, ()), *(["nncf"] if precision == "int8" else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"--to {to}{f' --precision {precision}' if precision != 'f32' else ''} needs "
            f"{', '.join(missing)}: pip install 'vitrim[export]'"
        )


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Give a folder inside `folder` to write to; at the end its files move up, all or none."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
        try:
            yield part
            files = sorted(part.iterdir())
            for path in files:
                path.chmod(0o644)
                with path.open("rb") as written:
                    os.fsync(written.fileno())
            for path in files:
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()  # of empty folders only
        raise

"""Export the compact network of a run for other programs; what is written is compared first.

    onnx      model.onnx          any number of images at once; compared in onnxruntime
    openvino  model.xml and .bin  the same, compared in OpenVINO; weights in f32, bf16 or int8
    torch     model.pt2           what torch.export.load reads
    timm      a folder            import timm, vitrim;
                                  timm.create_model("local-dir:FOLDER", pretrained=True)
    hf        the same folder     with a model card, ready for a hub
    transformers  a folder        AutoModelForImageClassification.from_pretrained("FOLDER"); ViTs
                                  with the same heads and widths in all blocks

The logits of what was written are compared with those of the network; then it replaces an earlier
export. --precision int8_static, of onnx and openvino, stores activations in int8 as well: it takes
images to calibrate and to evaluate on (data=NAME data.root=DIR, as for vitrim), and writes size,
accuracy and latency next to those of the network in float to int8.json. torch is imported when an
export starts, not before.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vitrim.deploy.runfolder import EXPORTS
from vitrim.errors import VitrimError
from vitrim.files import refuse_link

if TYPE_CHECKING:
    from vitrim.deploy.static_int8 import Images

FILES = {
    **{"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"},
    **{"timm": "", "hf": "", "transformers": ""},
}
"""The file of each format, in its folder; empty where it is the folder itself."""

PRECISIONS = ("f32", "bf16", "int8", "int8_static")
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "transformers": ("transformers",),
}

_EXTRA = "'vitrim[export]'"


class ExportError(VitrimError):
    """A network that cannot be exported, or whose export computes something else."""


def export(
    run: Path,
    format_name: str,
    *,
    out: Path | None = None,
    precision: str = "f32",
    image_size: int | None = None,
    images: Images | None = None,
) -> tuple[Path, str]:
    """Write the network saved in `run` in the format `format_name`, one of FILES.

    Files of an earlier export are replaced only once all of the new ones are complete. `images` are
    those that int8_static calibrates and evaluates on.

    Returns:
        The absolute path of what was written, and how far its logits are from the network's.

    Raises:
        VitrimError: `run` is no folder that vitrim saved, a package is missing, the format cannot
            hold the network, or the exported network computes something else.
    """
    check_precision(format_name, precision)
    if (precision == "int8_static") != (images is not None):
        raise ExportError("int8_static, and nothing else, needs images to calibrate on")
    from vitrim.deploy import formats
    from vitrim.deploy.saved import read_network
    from vitrim.deploy.static_int8 import write_static_int8

    saved = read_network(run, image_size=image_size)
    formats.check_images(saved)
    folder = run / EXPORTS / format_name if out is None else out
    for path in (folder.parent, folder) if out is None else ():
        refuse_link(path)
    with _staged(folder.absolute()) as stage:
        try:
            match format_name:
                case "onnx" | "openvino" if images is not None:
                    error = write_static_int8(saved, stage / FILES[format_name], images)
                case "onnx":
                    error = formats.onnx(saved, stage / FILES[format_name])
                case "openvino":
                    error = formats.openvino(saved, stage / FILES[format_name], precision=precision)
                case "torch":
                    error = formats.torch_export(saved, stage / FILES[format_name])
                case "transformers":
                    error = formats.transformers_folder(saved, stage)
                case _:
                    error = formats.timm_folder(saved, stage, card=format_name == "hf")
        except RuntimeError as failure:  # what torch.export, torch.onnx and OpenVINO raise
            raise ExportError(
                f"--format {format_name} cannot write or read the network: {failure}"
            ) from failure
    return (folder / FILES[format_name]).absolute(), error


def check_precision(format_name: str, precision: str) -> None:
    """Refuse what cannot work before the network is read.

    Raises:
        ExportError: the format has no such precision, or a package is missing.
    """
    supporting = {"f32": [*FILES], "int8_static": ["onnx", "openvino"]}.get(precision, ["openvino"])
    if format_name not in supporting:
        raise ExportError(
            f"--precision {precision}: only --format {' or '.join(supporting)} has it, "
            f"{format_name} is in f32"
        )
    needed = [*_PACKAGES.get(format_name, ()), *(["nncf"] if "int8" in precision else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        options = f" --precision {precision}" if precision != "f32" else ""
        raise ExportError(
            f"--format {format_name}{options} needs {', '.join(missing)}: pip install "
            f"{'transformers' if format_name == 'transformers' else _EXTRA}"
        )


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Give a folder inside `folder` to write to; at the end its files move up, all or none."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
        try:
            yield stage
            files = sorted(stage.iterdir())
            for path in files:
                path.chmod(0o644)
                with path.open("rb") as written:
                    os.fsync(written.fileno())
            for path in files:
                path.replace(folder / path.name)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()  # of empty folders only
        raise

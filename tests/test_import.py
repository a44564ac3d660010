"""What importing vitrim does to somebody else's process: nothing."""

import subprocess
import sys
from pathlib import Path

import vitrim
from fresh import python

ROOMS = (
    "budget.trim, budget.blocks, closed_form.reconstruction, data.imagefolder, deploy.export, "
    "jobs.sweep, measure, method, model.source, network, pipeline, plan, prune, report.tables, "
    "store, trainer.phases"
)
UNTOUCHED = f"""
import logging, sys, warnings
import lightning, timm
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf
before = [
    dict(vars(ConfigLoaderImpl)), list(warnings.filters), list(sys.meta_path),
    logging.getLogger("lightning.pytorch").level, OmegaConf.has_resolver("gpus_per_node"),
]
import vitrim
import {", ".join(f"vitrim.{name.strip()}" for name in ROOMS.split(","))}
[getattr(vitrim, name) for name in vitrim.__all__]
after = [
    dict(vars(ConfigLoaderImpl)), list(warnings.filters), list(sys.meta_path),
    logging.getLogger("lightning.pytorch").level, OmegaConf.has_resolver("gpus_per_node"),
]
for one, two in zip(before, after):
    assert one == two, (one, two)
"""
APPLICATION = """
import hydra
from hydra.experimental.callback import Callback
import vitrim
import vitrim.pipeline

class Notice(Callback):
    def on_job_start(self, config, **kwargs):
        print("called back")

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    print("runs", vitrim.Keep(site="blocks.0.mlp.hidden", index=(0,)).index)

main()
"""


def script(text: str, *arguments: str, folder: Path) -> str:
    path = folder / "script.py"
    path.write_text(text)
    done = python(str(path), *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_process_stays_as_it_was(tmp_path: Path) -> None:
    script(UNTOUCHED, folder=tmp_path)


def test_an_application_with_hydra_callbacks_runs(tmp_path: Path) -> None:
    callback = "+hydra.callbacks.notice._target_=__main__.Notice"
    assert script(APPLICATION, callback, folder=tmp_path).split()[:3] == ["called", "back", "runs"]


def test_importing_vitrim_is_light() -> None:
    text = "import sys, vitrim; assert not {'torch', 'timm', 'hydra'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", text], check=True)


def test_the_version_is_printed_by_the_command_and_the_module(tmp_path: Path) -> None:
    done = python("-m", "vitrim", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"vitrim {vitrim.__version__}\n")


def test_type_checkers_read_the_annotations() -> None:
    assert (Path(vitrim.__file__).parent / "py.typed").is_file()

"""Runs that earlier versions finished are found again by the same command."""

import shutil
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from command import EVERY_IMAGE, QUICK, Command, Done
from identities import write_images
from vitrim.cli import earlier
from vitrim.cli.compose import CONF
from vitrim.files import digest
from vitrim.method.dcvit.method import DCViT

EARLIER = Path(__file__).parent / "earlier"
"""Folders that 0.1.0 wrote: `vitrim data=none method=METHOD strength=2 latency.repeats=1`."""
FORMER = {
    "practise": (
        "method.recoverability=least_squares",
        "method.protected=[0,0]",
        "method.pooled_weight=0.0",
    ),
    "mir": ("method.protected=[0,0]",),
}
"""What 0.1.0 did by default, where the default is another now."""

BY_PATHS = Path(__file__).parent / "former"
"""Folders that were written when paths and settings of speed were part of a run's identity."""
ON_FILES = (
    *QUICK, EVERY_IMAGE, "data=imagefolder", "data.root=images", "data.batch_size=4",
    "data.workers=0", "data.augmentation.backend=pil",  # as there was no other one
    "model.num_classes=2", "model.args.in_chans=3",
)  # fmt: skip
COMMANDS = {
    "none-oneshot": ("data=none", "method=oneshot", "strength=2", "latency.repeats=1"),
    "digits-vtp": (
        *QUICK, EVERY_IMAGE, "method=vtp", "method.gating.epochs=1", "method.fine_tuning.epochs=1",
        "strength=2",
    ),
    "imagefolder-fskd": (*ON_FILES, "method=fskd", "data.samples=4", "strength=2"),
    "imagefolder-oneshot": (
        *ON_FILES, "method=oneshot", "data.bad_images.evaluation=skip", "target.macs=0.8",
    ),
}  # fmt: skip
"""The commands that wrote them."""


def of_earlier(command: Command, method: str, *words: str) -> Done:
    return command("data=none", f"method={method}", "strength=2", "latency.repeats=1", *words)


FOUND = sorted({path.name.split("-")[2] for path in EARLIER.iterdir()} - {"vtp"})
"""Methods of which a command gives the result of then: without images, VTP removes random units."""


@pytest.mark.parametrize("method", FOUND)
def test_a_run_of_an_earlier_version_is_found(command: Command, method: str) -> None:
    shutil.copytree(EARLIER, command.out)
    (report,) = command.out.glob(f"*-{method}-*/*/report.json")
    before = report.read_bytes()
    done = of_earlier(command, method, *FORMER.get(method, ()))
    assert done.code == 0
    assert done.report == report
    assert report.read_bytes() == before


@pytest.mark.parametrize("method", [*FORMER, "vtp"])
def test_a_default_that_gives_another_result_does_not_find_the_earlier_run(
    command: Command, method: str
) -> None:
    shutil.copytree(EARLIER, command.out)
    done = of_earlier(command, method)
    assert done.code == 0
    assert not (EARLIER / done.report.parent.parent.name).is_dir()


def test_an_earlier_run_of_vtp_with_images_is_found(command: Command) -> None:
    """Its new keys, the seed among them, decide nothing where gates are trained."""
    (folder,) = EARLIER.glob("*-vtp-*/*")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        recipe["data"] = OmegaConf.to_container(compose("run").data, resolve=True)
    name = digest(earlier._identifying_then(recipe, {"checkpoint_sha256": None}))
    run = command.out / "vit_digits-digits-vtp-01234567" / f"s2-seed0-{name}"
    shutil.copytree(folder, run)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = command("method=vtp", "strength=2", "latency.repeats=1")
    assert (done.code, done.report.parent) == (0, run)


def test_a_changed_recipe_does_not_take_the_earlier_run(command: Command) -> None:
    shutil.copytree(EARLIER, command.out)
    done = of_earlier(command, "oneshot", "method.scope=global")
    assert done.code == 0
    assert not any(done.report.parent.name == path.name for path in EARLIER.glob("*/*"))


def test_a_method_whose_results_changed_does_not_take_the_earlier_run(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(EARLIER, command.out)
    monkeypatch.setattr(DCViT, "revision", 2)
    done = command("data=none", "method=dcvit", "strength=2", "latency.repeats=1")
    assert done.code == 0
    assert not any(done.report.parent.name == path.name for path in EARLIER.glob("*/*"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_named_by_paths_is_found(
    command: Command, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    shutil.copytree(BY_PATHS, command.out)
    (report,) = command.out.glob(f"vit_digits-{name}-*/*/report.json")
    before = report.read_bytes()
    done = command(*COMMANDS[name])
    assert done.report == report, done.message
    assert report.read_bytes() == before
    if name == "imagefolder-fskd":
        assert command(*COMMANDS[name], "trainer.log_every_n_steps=7").report == report


def test_a_run_named_by_paths_is_not_taken_for_one_on_other_images(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "others")
    shutil.copytree(BY_PATHS, command.out)
    done = command(*COMMANDS["imagefolder-fskd"], "data.root=others")
    assert done.code == 0
    assert not any(done.report.parent.name == path.name for path in BY_PATHS.glob("*/*"))

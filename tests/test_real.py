"""Real weights and images, where they are at hand: numbers that random networks cannot give."""

import json
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from command import Command
from targets import target_of
from vitrim.budget.cost import Cost
from vitrim.cli.compose import CONF
from vitrim.data import ImageSpec
from vitrim.method.mixed_rank.method import MixedRank
from vitrim.method.mixed_rank.metric import rank_curves
from vitrim.method.mixed_rank.pieces import statistics_of
from vitrim.method.mixed_rank.profile import Profile
from vitrim.model.teacher import Teacher
from vitrim.network import structure
from vitrim.network.surgery import cut
from vitrim.plan import Evidence, Plan
from vitrim.trainer.activations import capture

DATA = Path(__file__).parents[2] / "shared" / "data"
TAR, WEIGHTS = DATA / "imagenet_mini.tar", DATA / "vit_tiny_patch16_224.safetensors"
pytestmark = pytest.mark.skipif(
    not (TAR.is_file() and WEIGHTS.is_file()), reason=f"no real weights and images in {DATA}"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(TAR) as archive:
        archive.extractall(folder, filter="data")
    return folder


def stages(command: Command, pictures: Path, *arguments: str) -> dict[str, float]:
    done = command(
        "experiment=oneshot/vit_tiny",
        f"data.root={pictures}",
        f"model.checkpoint={WEIGHTS}",
        "data.workers=0",
        "trainer.log_every_n_steps=1",
        "latency.repeats=1",
        "tracking=none",
        "progress=false",
        *arguments,
    )
    assert done.code == 0, done.message
    report = json.loads(done.report.read_text())
    return {
        "dense": report["dense"]["top1"],
        **{name: found["top1"] for name, found in report["stages"].items()},
    }


def test_few_images_keep_most_of_the_accuracy(command: Command, pictures: Path) -> None:
    few = ("method.sampling.images=32", "data.batch_size=25", "trainer.limit_val_batches=1")
    found = stages(command, pictures, "strength=1", *few)
    assert found["refit"] > found["dense"] - 8


@pytest.mark.slow
@pytest.mark.parametrize(("strength", "top1"), [(1, 80.0), (3, 74.0), (5, 57.0)])
def test_without_training(command: Command, pictures: Path, strength: int, top1: float) -> None:
    assert stages(command, pictures, f"strength={strength}")["refit"] >= top1


@pytest.fixture(scope="module")
def proxy(pictures: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Return ViT-Ti, images to decompose by (150, 3, 224, 224) and images held out (50, ...)."""
    net = timm.create_model("vit_tiny_patch16_224").eval()
    net.load_state_dict(safetensors.torch.load_file(WEIGHTS))
    prepare = create_transform(**resolve_data_config({}, model=net))
    found = []
    for part, number in (("train", 150), ("val", 50)):
        files = sorted((pictures / part).glob("*/*"))[:: 6 if part == "train" else 13][:number]
        found.append(torch.stack([prepare(Image.open(file).convert("RGB")) for file in files]))
    return net, found[0], found[1]


MOBILENET = DATA / "mobilenetv2_100_tf2_padsame.safetensors"


@pytest.mark.slow
@pytest.mark.skipif(not MOBILENET.is_file(), reason=f"no {MOBILENET}")
@pytest.mark.parametrize(("size", "least"), [(224, 75.0), (160, 65.0)])
def test_a_real_teacher_knows_the_images_of_the_student(
    pictures: Path, size: int, least: float
) -> None:
    """The weights are of mean and std 0.5; images arrive in those of ImageNet."""
    unset = dict.fromkeys(("sha256", "num_classes", "image_size", "alpha", "temperature"))
    teacher = Teacher(
        **{"name": "mobilenetv2_100", "args": {"pad_type": "same"}, "checkpoint": str(MOBILENET)},
        **{"mean": [0.5] * 3, "std": [0.5] * 3, "distillation": "soft", **unset},
    )
    classes = sorted(folder.name for folder in (pictures / "train").iterdir())
    files = sorted((pictures / "val").glob("*/*"))[::3]
    prepare = create_transform((3, size, size), interpolation="bicubic", crop_pct=0.875)
    x = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
    found = teacher.build(
        ImageSpec(
            **{"channels": 3, "size": (size, size), "interpolation": "bicubic", "crop_pct": 0.875},
            **{"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
        )
    )
    with torch.no_grad():
        logits = torch.cat([found.teacher(found.view(part)) for part in x.split(31)])
        assert float((logits.argmax(1) == labels).float().mean()) >= least / 100
        of_labels = torch.tensor(9.0)
        as_it_says = float(found.loss(x[:31], logits[:31], of_labels))
        as_a_guess = float(found.loss(x[:31], logits[:31].roll(1, 0), of_labels))
    assert as_it_says == pytest.approx(0.9 * 9.0, abs=1e-4)
    assert as_a_guess > as_it_says + 0.1


KNOWN: dict[str, Evidence] = {}


def profiled(method: MixedRank, net: nn.Module, x: Tensor) -> Evidence:
    """Return what the method learns of `x`, once for all tests."""
    phase = method.scorer(net)
    key = json.dumps(phase.settings)
    if key not in KNOWN:
        KNOWN[key] = learned(phase, x)
    return KNOWN[key]


def learned(phase: Profile, x: Tensor) -> Evidence:
    phase.on_train_start()
    for place, batch in enumerate(x.split(50)):
        phase.training_step((batch, None), place)
    phase.on_train_end()
    return phase.evidence()


@pytest.mark.slow
@pytest.mark.parametrize("decomposition", ["whitening", "centred"])
def test_activation_aware_factors_lose_less_of_unseen_outputs_at_every_rank(
    proxy: tuple[nn.Module, Tensor, Tensor], decomposition: str
) -> None:
    net, seen, unseen = proxy
    whole = () if decomposition == "whitening" else ("class_token_weight=1.0", "tokens=null")
    method = mixed_rank(
        f"method.decomposition={decomposition}",
        "method.allocation=error",
        *(f"method.sampling.{word}" for word in whole),  # all tokens alike, as they are judged
    )
    evidence = profiled(method, net, seen)
    pieces = method._pieces(structure(net))
    names = [*dict.fromkeys(piece.layer for piece in pieces.values())]
    with torch.no_grad(), capture(net, [(name, False) for name in names]) as flows:
        net(unseen)
    for name, piece in pieces.items():
        x, weight = (
            flows[name].flatten(0, -2).double(),
            net.get_parameter(f"{name}.weight").detach(),
        )
        x = x - x.mean(0) if decomposition == "centred" else x  # the bias takes the mean
        second = x.T @ x / len(x)
        aware = method._spectrum(net, piece, statistics_of(name, piece, evidence))
        plain = method._spectrum(net, piece, {})
        errors = [rank_curves(weight, spectrum, second)["error"] for spectrum in (aware, plain)]
        assert len(errors[0]) > 10
        assert all(ours <= theirs + 1e-6 for ours, theirs in zip(*errors, strict=True)), name


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.9, 0.8])
def test_the_default_allocation_changes_unseen_outputs_less_than_uniform_ranks(
    proxy: tuple[nn.Module, Tensor, Tensor], share: float
) -> None:
    net, seen, unseen = proxy
    errors = {}
    with torch.no_grad():
        dense = net(unseen)
    for rule in ("loss", "uniform"):
        method = mixed_rank(f"method.allocation={rule}")
        evidence, target = profiled(method, net, seen), target_of(method, params=share)
        plan = Plan(model={}, edits=method.plan(net, evidence, Cost(net, 224), target).edits)
        compact = cut(net, plan)
        with torch.no_grad():
            for name, value in method.compensation_of(net, compact, plan, evidence).items():
                compact.get_parameter(name).copy_(value)
            errors[rule] = float((compact(unseen) - dense).square().mean())
    assert errors["loss"] < errors["uniform"]


def mixed_rank(*overrides: str) -> MixedRank:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=["method=mixed_rank", "model=vit_tiny", *overrides])
    found: MixedRank = instantiate(cfg.method, _convert_="all")
    return found

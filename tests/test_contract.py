"""What every method's yaml must do, from the command line to a report and a loadable network.

A method with `granularity` block may leave the same network at two strengths; one with "none"
removes nothing, and trains the network of an earlier run. A method of another package is tested by
VITRIM_CONTRACT_PACKAGE=FOLDER, which holds the package and conf/method/*.yaml in it.
"""

import copy
import json
import os
import shutil
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import vitrim
from command import QUICK, Command, Done, swin
from contract import NAMES, PACKAGE, Subject
from contract import subject as build
from nets import outputs, randomise, relative_error
from vitrim.budget.cost import Cost
from vitrim.budget.target import resolve_target
from vitrim.files import WEIGHTS, sha256
from vitrim.jobs.status import LOCK
from vitrim.measure import count
from vitrim.network.masking import masked
from vitrim.network.surgery import cut
from vitrim.plan import Plan
from vitrim.trainer import resume

CNN = (
    "model=resnet34",
    "model.name=resnet18",
    "+model.args.channels=[8,8,8,8]",
    "model.num_classes=10",
    "model.image_size=32",
    "data=none",
)
SIZE = (1, 8, 8)
DIGITS = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}
build = cache(build)
REMOVING = [name for name in NAMES if build(name).method.granularity != "none"]
TRAINING = [name for name in NAMES if build(name).method.granularity == "none"]


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return build(request.param)


@pytest.fixture
def command(
    command: Command, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Command]:
    """Return the command, with the dense networks that this test has trained for other methods."""
    trained = tmp_path_factory.getbasetemp() / request.function.__name__
    link(trained, command.out / "phases")
    yield command
    link(command.out / "phases", trained)


def link(source: Path, to: Path) -> None:
    """Give `to` hard links of the dense phases in `source`: the files are replaced, not changed."""
    for phase in source.glob("dense-*"):
        if not (to / phase.name).exists():
            ignored = shutil.ignore_patterns(LOCK, "checkpoints")
            shutil.copytree(phase, to / phase.name, copy_function=os.link, ignore=ignored)


def run(command: Command, subject: Subject, *more: str) -> Done:
    done = command(*subject.arguments, *more)
    assert done.code == 0, done.message
    return done


def report_of(done: Done) -> dict[str, dict[str, float]]:
    return json.loads(done.report.read_text())


def test_methods_are_found() -> None:
    assert REMOVING
    assert PACKAGE or len(NAMES) >= len(list(Path(vitrim.__file__).parent.glob("method/[!_]*")))
    assert all(set(build(name).arguments) > {f"method={name}"} for name in NAMES)


@pytest.mark.parametrize("subject", REMOVING, indirect=True)
def test_strength_0_is_the_identity(command: Command, subject: Subject) -> None:
    done = run(command, subject, "strength=0")
    net, plan = vitrim.load(done.report.parent)
    assert plan.edits == ()
    (dense,) = command.out.glob("phases/dense-*/state.safetensors")
    state = safetensors.torch.load_file(dense)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[f"net.{name}"]), name
    report = report_of(done)
    assert report["cut"]["top1"] == report["dense"]["top1"] == report["compact"]["top1"]


@pytest.mark.parametrize(
    "subject",
    [pytest.param(name, marks=() if PACKAGE else pytest.mark.slow, id=name) for name in REMOVING],
    indirect=True,
)
def test_every_method_cuts_a_swin(command: Command, subject: Subject) -> None:
    assert_is_cut(run(command, subject, "strength=2.5", *swin("[2,2]")), subject)


def assert_is_cut(done: Done, subject: Subject) -> None:
    """Check the report, the network and the plan of a run that removed something."""
    report = report_of(done)
    assert report["compact"]["params"] < report["dense"]["params"]
    assert report["compact"]["macs"] < report["dense"]["macs"]
    net, plan = vitrim.load(done.report.parent)
    assert plan.method == subject.name
    images = torch.rand(2, 1, 8, 8)
    logits = net(images)
    assert logits.shape == (2, 10)
    assert torch.equal(vitrim.load(done.report.parent)[0](images), logits)
    assert_cut_equals_masked(plan)


def assert_cut_equals_masked(plan: Plan) -> None:
    """Compare the two readings of a plan on random weights, in double precision."""
    dense = timm.create_model(plan.model["name"], **plan.model["args"]).double()
    randomise(dense)
    images = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    expected = outputs(masked(dense, plan), images)
    assert relative_error(outputs(cut(dense, plan), images), expected) < 1e-9


@pytest.mark.parametrize("subject", REMOVING, indirect=True)
def test_no_method_grows_with_strength(subject: Subject) -> None:
    net, method = timm.create_model("vit_tiny_patch16_224", **DIGITS), subject.method
    cost = Cost(net, SIZE)
    evidence = method.scorer(copy.deepcopy(net)).evidence()  # without images

    def params(strength: float) -> int:
        target = resolve_target(
            strength, {}, levels=method.levels, metric=method.metric, where=subject.name
        )
        method.check(cost, target)
        edits = () if target.is_identity else method.plan(net, evidence, cost, target).edits
        return count(cut(net, Plan(model={}, edits=edits)), SIZE).params

    sizes = [params(strength) for strength in (0, 1, 3, 5)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes) or method.granularity == "block"


@pytest.mark.parametrize("subject", REMOVING, indirect=True)
def test_an_explicit_budget_is_met(command: Command, subject: Subject) -> None:
    report = report_of(run(command, subject, "target.macs=0.7", "data=none"))
    assert 0.3 < report["kept"]["macs"] <= 0.7
    assert report["strength"] is None


@pytest.mark.parametrize("subject", REMOVING, indirect=True)
def test_a_convolutional_network_is_cut_or_refused(command: Command, subject: Subject) -> None:
    done = command(*subject.arguments, *CNN, "target.macs=0.8")
    if done.code:
        assert "Traceback" not in done.message
        assert not list(command.out.rglob("recipe.yaml"))
        return
    assert report_of(done)["kept"]["macs"] <= 0.8
    net, _ = vitrim.load(done.report.parent)
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("subject", "more"),
    [(name, ()) for name in REMOVING] + [("oneshot", ("method.scope=loss",))] * (PACKAGE is None),
    indirect=["subject"],
)
def test_every_method_runs_and_resumes_to_the_same_bits(
    command: Command, subject: Subject, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = 1 + NAMES.index(subject.name) % 4  # another batch for every method
    words = ("strength=3", *more)
    done = run(command, subject, *words)
    assert_is_cut(done, subject)
    whole = done.report
    (scored,) = (command.out / "phases").glob("score-*")
    assert (scored / "manifest.json").is_file()
    digest, numbers = sha256(whole.parent / WEIGHTS), comparable(whole)
    shutil.rmtree(whole.parent)
    shutil.rmtree(scored)
    batches = 0

    def received() -> int | None:
        nonlocal batches
        batches += 1
        return signal.SIGTERM if batches == step else None

    with monkeypatch.context() as patch:
        patch.setattr(resume.signals, "received", received)
        stopped = command(*subject.arguments, *words)
    if batches >= step:  # otherwise the method has fewer batches in all
        assert stopped.code == 143, stopped.message
    again = run(command, subject, *words).report
    assert again == whole
    assert sha256(again.parent / WEIGHTS) == digest
    assert comparable(again) == numbers


def comparable(report: Path) -> dict[str, object]:
    """Return what a report says but for times."""
    numbers = json.loads(report.read_text())
    for side in ("dense", "compact"):
        for key in [key for key in numbers[side] if key.startswith("latency")]:
            del numbers[side][key]
    del numbers["seconds"]
    return numbers


@pytest.mark.parametrize("subject", TRAINING, indirect=True)
def test_what_removes_nothing_trains_an_earlier_network(command: Command, subject: Subject) -> None:
    first = command("method=oneshot", "strength=3", *QUICK)
    start = first.report.parent
    done = run(command, subject, "strength=0", f"from_run={start}")
    net, plan = vitrim.load(done.report.parent)
    before, plan_before = vitrim.load(start)
    assert plan.edits == plan_before.edits
    assert not torch.equal(net.get_parameter("head.weight"), before.get_parameter("head.weight"))
    assert command(*subject.arguments, "strength=0").code == 1
    assert command(*subject.arguments, "strength=2", f"from_run={start}").code == 1

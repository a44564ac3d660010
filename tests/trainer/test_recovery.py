"""Recovery from few images: what is trained, what is kept, and that it resumes to the same bits."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor, nn

from nets import images, plan_of, small_net
from phase_runner import DIGITS, SPEC, At, runner, stop
from vitrim import cut
from vitrim.data.digits import Digits
from vitrim.data.loader import ResumableLoader
from vitrim.errors import ConfigError
from vitrim.jobs import signals
from vitrim.jobs.signals import Preempted
from vitrim.trainer.calibrate import Sampling
from vitrim.trainer.kept_states import KeptStates
from vitrim.trainer.low_rank_updates import LowRankUpdates, matrices
from vitrim.trainer.mimic import Mimic
from vitrim.trainer.phase import AllButHeldOut
from vitrim.trainer.phase_images import training_batches
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.recovery import HeldOut, Network, Outputs, Recovery, RecoverySettings
from vitrim.trainer.views import Views

STEPS = 3  # in an epoch: 58 images, 16 a batch; 6 are held out
RECIPE = Recipe(epochs=3, lr=2e-3, weight_decay=0.05, warmup_epochs=0, clip_norm=1.0)
PLAIN: dict[str, Any] = {"crop": 1.0, "flip": False, "mix": []}
ALL_VIEWS = Views(crop=0.5, flip=True, mix=["mixup", "cutmix", "patchmix"])


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    with signals.handled():
        yield


def settings(**changes: Any) -> RecoverySettings:
    values: dict[str, Any] = {
        "trained": "all",
        "rank": None,
        "views": ALL_VIEWS,
        "token_weight": 1.0,
        "pooled_weight": 1.0,
        "logits_weight": 1.0,
        "temperature": 2.0,
        "ema": 0.5,
        "held_out": 0.1,
        "patience": 2,
        "training": RECIPE,
    }
    return RecoverySettings(**{**values, **changes})


def phase(**changes: Any) -> Recovery:
    net, n = {**DIGITS, **changes.pop("net", {})}, changes.pop("images", 64)
    teacher = small_net(dtype=torch.float32, **net)
    student = cut(teacher, plan_of({"blocks.0.mlp.hidden": range(20)}))
    return Recovery(student, teacher, settings=settings(**changes), images=n)


def trained(module: Recovery, folder: Path, *callbacks: Callback, **options: Any) -> Recovery:
    run = runner(folder, batch_size=16)
    run = replace(run, trainer=partial(run.trainer, **options))
    run.run_or_load(folder / "x", module, name="x", callbacks=callbacks)
    return module


def distance(module: Recovery) -> float:
    """Return how far the network of a phase is from its teacher on all digits but the held-out."""
    batches = [(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)]
    held_out = HeldOut(batches, module.loss)
    held_out.keep_targets(module._teacher)
    return held_out.distance(Network(module.net.eval()))


def runner_data() -> Any:
    return Digits(
        batch_size=16, held_out=0.2, shift=1.0, rotation=10.0, label_smoothing=0.1
    ).module(SPEC)


def same(one: nn.Module, two: nn.Module) -> bool:
    states = one.state_dict(), two.state_dict()
    return all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


LOW_RANK = {"trained": "low_rank", "rank": 2}
ACCUMULATED = {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}


@pytest.mark.parametrize(
    ("changes", "options", "steps"),
    [({}, {}, (1, STEPS, STEPS + 2, 9)), (LOW_RANK, ACCUMULATED, (STEPS + 1, 9))],  # 9: the last
    ids=["all", "low_rank"],
)
def test_stopped_at_any_step_recovery_ends_the_same(
    changes: dict[str, Any], options: dict[str, Any], steps: tuple[int, ...], tmp_path: Path
) -> None:
    whole = trained(phase(**changes), tmp_path / "whole", **options)
    assert len(whole.states.history) == 1 + RECIPE.epochs
    assert min(whole.states.history[1:]) < whole.states.history[0]
    for step in steps:
        folder = tmp_path / str(step)
        with pytest.raises(Preempted), signals.handled():
            trained(phase(**changes), folder, At(step, stop()), **options)
        again = trained(phase(**changes), folder, **options)
        assert again.states.history == whole.states.history
        assert same(again.net, whole.net)
    loaded = trained(phase(**changes), tmp_path / "whole", **options)
    assert same(loaded.net, whole.net)


WORSE = {"training": replace(RECIPE, lr=1.0, epochs=6, clip_norm=0.0), "patience": 2, "ema": 0.0}


def test_what_only_gets_worse_is_stopped_and_the_state_before_training_kept(
    tmp_path: Path,
) -> None:
    before = phase().net
    module = trained(phase(**WORSE), tmp_path / "whole")
    assert len(module.states.history) == 1 + 2
    assert module.states.history[0] == min(module.states.history)
    assert same(module.net, before)
    with pytest.raises(Preempted), signals.handled():  # after the decision to stop
        trained(phase(**WORSE), tmp_path / "stopped", At(2 * STEPS, stop()))
    again = trained(phase(**WORSE), tmp_path / "stopped")
    assert again.states.history == module.states.history
    assert same(again.net, before)


def test_the_best_state_is_kept_not_the_last() -> None:
    net = nn.Linear(1, 1)
    states = KeptStates(net, decay=0.0)
    for number, value in enumerate([3.0, 1.0, torch.nan, 2.0]):
        nn.init.constant_(net.bias, number)
        states.keep_if_best(value)
    assert [states.is_stale(patience) for patience in (2, 3, None)] == [True, False, False]
    states.restore()
    assert net.bias.item() == 1


def test_recovery_comes_nearer_to_the_teacher_on_other_images(tmp_path: Path) -> None:
    before = distance(phase())
    module = trained(phase(), tmp_path)
    assert distance(module) < before
    assert all(parameter.requires_grad for parameter in module.net.parameters())


def test_without_held_out_images_the_average_is_the_result(tmp_path: Path) -> None:
    module = trained(phase(held_out=0.0, patience=None), tmp_path / "a")
    last = trained(phase(held_out=0.0, patience=None, ema=0.0), tmp_path / "b")
    assert module.states.history == []
    assert not same(module.net, last.net)


def test_the_average_of_one_step_is_nearly_the_state_after_it() -> None:
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight)
    states = KeptStates(net, decay=0.99)
    states.start()
    nn.init.ones_(net.weight)
    states.move_average(1)
    with states.averaged():
        assert net.weight.item() == pytest.approx(1 - 2 / 11)
    assert net.weight.item() == 1.0


def test_scales_only_leave_every_matrix_untouched(tmp_path: Path) -> None:
    before = dict(phase().net.named_parameters())
    module = trained(phase(trained="scales"), tmp_path)
    after = dict(module.net.named_parameters())
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(after[name].ndim == 1 for name in changed)
    assert "norm.weight" in changed


def test_merged_low_rank_updates_are_the_network_with_updates() -> None:
    net = small_net()
    updates = LowRankUpdates(net, 2)
    assert not [name for name in matrices(net) if name.startswith("head.")]
    assert torch.equal(Network(net, updates)(images()).logits, net(images()))
    for up in updates.up.values():
        nn.init.normal_(up)
    with torch.no_grad():
        expected = Network(net, updates)(images())
        assert not torch.allclose(expected.logits, net(images()))
        updates.merge(net)
        for found in (Network(net)(images()), Network(net, updates)(images())):
            assert torch.allclose(found.features, expected.features)
            assert torch.allclose(found.logits, expected.logits)


def test_low_rank_updates_have_their_rank_in_the_saved_network(tmp_path: Path) -> None:
    before = dict(phase().net.named_parameters())
    module = trained(phase(**LOW_RANK, ema=0.0), tmp_path)
    for name, weight in matrices(module.net).items():
        singular = torch.linalg.svdvals((weight - before[name]).detach().double())
        assert singular[2] < 1e-4 * singular[0], name


def test_student_and_teacher_see_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    module = phase()
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    seen: list[Tensor] = []

    def recorded(network: Network) -> Any:
        def run(x: Tensor) -> Outputs:
            seen.append(x)
            return network(x)

        return run

    for name in ("_student", "_teacher"):
        monkeypatch.setattr(module, name, recorded(getattr(module, name)))
    x = torch.rand(4, 1, 8, 8)
    module.training_step((x, torch.zeros(4)), 0)
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], x)


@pytest.mark.parametrize("mix", ["mixup", "cutmix", "patchmix"])
def test_mixtures_are_of_two_images_of_the_batch(mix: str) -> None:
    torch.manual_seed(0)
    x = torch.arange(4.0)[:, None, None, None].expand(4, 3, 28, 28)
    view = Views(crop=1.0, flip=False, mix=[mix]).of(x)
    assert view.shape == x.shape
    assert not torch.equal(view, x)
    values = [image.unique() for image in view]
    if mix == "mixup":
        assert all(len(found) == 1 for found in values)
        assert 0 <= view.min() <= view.max() <= 3
    else:
        assert all(len(found) <= 2 for found in values)
        assert torch.equal(view.unique(), x.unique())


def test_crops_and_flips() -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 3, 16, 16)
    assert Views(**PLAIN).of(x) is x
    flipped = Views(**{**PLAIN, "flip": True}).of(x)
    plain = [torch.allclose(a, b, atol=1e-5) for a, b in zip(flipped, x, strict=True)]
    mirrored = [torch.allclose(a, b.flip(-1), atol=1e-5) for a, b in zip(flipped, x, strict=True)]
    assert [a or b for a, b in zip(plain, mirrored, strict=True)] == [True] * 8
    assert any(plain)
    assert any(mirrored)
    ramp = torch.linspace(0, 1, 16).expand(8, 1, 16, 16)
    cropped = Views(**{**PLAIN, "crop": 0.25}).of(ramp)
    widths = (cropped[..., -1] - cropped[..., 0])[:, 0, 0]
    assert 0.3 < widths.min() < widths.max() < 1.01


def test_a_network_without_a_classifier_recovers_its_features(tmp_path: Path) -> None:
    module = trained(phase(net={"num_classes": 0}, patience=None), tmp_path)
    assert min(module.states.history) < module.states.history[0]


def test_a_calibration_does_not_see_the_images_that_are_held_out() -> None:
    how, data = settings(), runner_data()
    sampling = Sampling(images=64, tokens=3, class_token_weight=4.0)
    calibrated = data.calibration_dataloader(how.calibration(sampling).images, 5)
    split = data.split_dataloaders(64, 5, held_out=how.held_out, place=(0, 1))
    seen, trained_on, held_out = (
        {row.numpy().tobytes() for row in torch.utils.data.default_collate([*loader.images])[0]}
        for loader in (calibrated, *split)
    )
    assert (len(seen), len(held_out)) == (58, 6)
    assert trained_on == seen
    assert not held_out & seen
    few = replace(sampling, images=1000, available_images=50)
    assert how.calibration(few).images == 45
    assert how.calibration(few).tokens_per_image == few.tokens_per_image
    assert settings(held_out=0.0, patience=None).calibration(few) is few


@pytest.mark.parametrize("fine_tune", [True, False])
def test_mimicking_before_a_recovery_does_not_see_what_it_holds_out(
    fine_tune: bool, tmp_path: Path
) -> None:
    how, run = settings(), runner(tmp_path, batch_size=16)
    teacher = small_net(dtype=torch.float32, **DIGITS)
    images = AllButHeldOut(of=how.images(64)) if fine_tune else None
    mimic = Mimic(teacher, teacher, recipe=replace(RECIPE, epochs=1), images=images)
    assert training_batches(mimic, run.data, seed=run.seed, repeats=1) is None
    loader = run.data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    _, held_out = run.data.split_dataloaders(64, run.seed, held_out=0.1, place=(0, 1))
    trained_on, later = (
        {row.numpy().tobytes() for row in torch.utils.data.default_collate([*part.images])[0]}
        for part in (loader, held_out)
    )
    assert bool(later & trained_on) is not fine_tune
    assert training_batches(phase(), run.data, seed=run.seed, repeats=1) is not None
    assert not run.data.left_out


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 training image.*held_out=0"):
        trained(phase(images=1), tmp_path)
    trained(phase(images=1, held_out=0.0, patience=None), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": "none"}, r"recovery\.trained=none.*all, scales, low_rank"),
        ({"rank": 4}, r"recovery\.rank=4.*null with the others"),
        ({"trained": "low_rank"}, r"recovery\.rank=null.*from 1"),
        ({"temperature": 0.0}, r"recovery\.temperature=0"),
        ({"ema": 1.0}, r"recovery\.ema=1.*below 1"),
        ({"held_out": 0.6}, r"recovery\.held_out=0\.6.*0\.5"),
        ({"held_out": 0.0}, r"recovery\.patience=2.*held_out=0"),
        ({"patience": 0}, r"recovery\.patience=0"),
        ({"token_weight": -1.0}, r"recovery\.token_weight=-1"),
        (
            {"token_weight": 0.0, "pooled_weight": 0.0, "logits_weight": 0.0},
            r"recovery\.logits_weight=0.*above 0",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 0.0}, r"views\.crop=0"),
        ({"flip": 1}, r"views\.flip=1.*true or false"),
        ({"mix": ["nose"]}, r"views\.mix=\[nose\].*patchmix"),
        ({"mix": "cutmix"}, r"views\.mix=cutmix.*list"),
    ],
)
def test_views_that_cannot_be_drawn_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Views(**{**PLAIN, **changes})


def test_a_network_without_layers_has_no_low_rank_updates() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    net.get_classifier = lambda: None
    with pytest.raises(ConfigError, match=r"trained=low_rank.*all or scales"):
        LowRankUpdates(net, 2)

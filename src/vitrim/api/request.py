"""What a user asks `vitrim.compress` for, checked before any of the work is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from vitrim.api.given import Given, given, image_shape
from vitrim.api.images import NO_LABEL, HeldImages, OwnData, check_train, hold
from vitrim.api.settings import CONF, build_method, method_names, method_settings
from vitrim.budget.cost import Cost, shared_cost
from vitrim.budget.latency import LatencyGrid, LatencyTable, load_or_measure
from vitrim.budget.target import METRICS, Target, resolve_target
from vitrim.errors import ConfigError, VitrimError, is_count
from vitrim.files import PHASES, writable
from vitrim.method import Method, can_compress, check_method, scorer_of
from vitrim.model.identify import Identified
from vitrim.network import UnsupportedArchitecture
from vitrim.trainer.phase import check_scorer
from vitrim.trainer.trainer_options import VALIDATION_EPOCHS, keeping_best

_MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a network is compressed, as the user says it.

    Args:
        method: its name, or the method itself.
        strength: in place of a budget.
        budget: what may remain, by metric.
        settings: changed keys of the method's yaml.
        n_images: how many images are used; None: the method's number.
        batch_size: None: the command's.
        seed: of everything that is random.
    """

    method: str | Method
    strength: float | None = None
    budget: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    n_images: int | None = None
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("n_images", self.n_images), ("batch_size", self.batch_size)):
            if value is not None and not is_count(value):
                raise ConfigError(f"{name}={value}: expected a whole number from 1 on")
        if type(self.seed) is not int or not 0 <= self.seed <= _MAX_SEED:
            raise ConfigError(f"seed={self.seed}: expected a whole number from 0 to {_MAX_SEED}")
        if self.strength is None and not any(keep is not None for keep in self.budget.values()):
            raise ConfigError(
                "no budget: give one of "
                f"{', '.join(METRICS)}, such as macs=0.6, or a strength from 0 to 5"
            )
        if not isinstance(self.method, str):
            check_method(self.method)
            if self.settings or self.n_images is not None:
                keys = ", ".join([*self.settings, *(["n_images"] if self.n_images else [])])
                raise ConfigError(f"{keys}: of a method that is given by its name: set them in it")

    @property
    def name(self) -> str:
        """The name of the method."""
        return self.method if isinstance(self.method, str) else type(self.method).__name__.lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be run."""

    found: Identified
    model: Given
    method: Method
    target: Target
    data: OwnData
    options: Options
    settings: Mapping[str, object]

    @property
    def name(self) -> str:
        """The name of the method."""
        return self.options.name

    def latency_table(self, out: Path, *, on_gpu: bool) -> Callable[[], LatencyTable] | None:
        """Return what gives the table that predicts latency; None where the target is no time."""
        return _table(self.model, out, on_gpu=on_gpu) if self.target.is_time else None


def request(
    found: Identified, options: Options, images: object, *, train: object, validation: object
) -> Request:
    """Return what is to be run, its images read.

    Raises:
        VitrimError: what cannot work.
    """
    settings = dict(options.settings)
    number = _number_of_images(options)
    held = hold(images, most=number)
    if options.n_images is not None and len(held) < options.n_images:
        raise ConfigError(f"n_images={options.n_images}: images has {len(held)} only")
    shape, any_size = image_shape(found)
    own_size = tuple(held[0][0].shape[1:])
    model = given(found, (own_size[0], own_size[1]) if any_size else shape[1:])
    method = options.method
    if isinstance(method, str):
        settings, method = _build(options, number, len(held), str(found.model["name"]))
    target = resolve_target(
        options.strength,
        cast(Mapping[str, float], options.budget),
        levels=method.levels,
        metric=method.metric,
        where=f"method={options.name!r}",
        several=bool(getattr(method, "several_budgets", False)),
    )
    data = OwnData(
        images=held,
        train=train,
        validation=_validation(validation, model),
        n_classes=model.n_classes,
        needed=len(held) if number is None else min(number, len(held)),
        batch_size=options.batch_size or _batch_size(),
        seed=options.seed,
    )
    _check_labels(method, train, held)
    _check_keep(settings, evaluates=validation is not None)
    _check_method(model, method, target, options.name, found)
    data.check(shape, any_size=any_size)
    return Request(
        found=found,
        model=model,
        method=method,
        target=target,
        data=data,
        options=options,
        settings=settings,
    )


def _number_of_images(options: Options) -> int | None:
    """Return how many images the method uses at most; None: all of the training set."""
    if options.n_images is not None:
        return options.n_images
    if isinstance(options.method, str):
        known = method_settings(options.method, options.settings, seed=options.seed)
        sampling = known.get("sampling", {})
        number = known.get("images", sampling.get("images") if sampling else None)
    else:
        sampling = getattr(options.method, "sampling", None)
        number = getattr(options.method, "images", getattr(sampling, "images", None))
    return number if is_count(number) else None


def _build(
    options: Options, number: int | None, available: int, network: str
) -> tuple[dict[str, Any], Method]:
    """Return the settings of a method by name, and the method."""
    name = cast(str, options.method)
    around: dict[str, Any] = {"seed": options.seed, "network": network}
    if number is not None and available < number:
        around["samples"] = available
    changes = dict(options.settings)
    if options.n_images is not None:
        known = method_settings(name)
        key = next((key for key in ("images", "sampling") if key in known), None)
        if key is None:
            raise ConfigError(f"n_images: method={name!r} trains on all of its images")
        changes["images" if key == "images" else "sampling.images"] = options.n_images
    return method_settings(name, changes, **around), build_method(name, changes, **around)


def _validation(validation: object, model: Given) -> HeldImages | None:
    """Return the images to evaluate on, with labels that the network knows."""
    if validation is None:
        return None
    if not model.n_classes:
        raise ConfigError("validation: the network has no classifier (num_classes=0)")
    held = hold(validation, most=None, name="validation")
    for index in range(len(held)):
        label = held[index][1]
        if label == NO_LABEL:
            raise ConfigError(f"validation: image {index} has no label")
        if not 0 <= label < model.n_classes:
            raise ConfigError(
                f"validation: image {index} has label {label}: expected 0 to {model.n_classes - 1}"
            )
    return held


def _check_labels(method: Method, train: object, held: HeldImages) -> None:
    """Refuse a method that trains with labels where there are none."""
    if train is not None:
        check_train(train)
        return
    if _uses_labels(method) and held[0][1] == NO_LABEL:
        raise ConfigError(
            f"{type(method).__name__} trains with labels, and images has none: give train=LOADER, "
            "batches of (images, labels)"
        )


def _check_keep(settings: object, *, evaluates: bool) -> None:
    """Refuse to keep the best weights of a training that is not validated."""
    for key, epochs in keeping_best(settings):
        if not evaluates or epochs < VALIDATION_EPOCHS:
            raise ConfigError(
                f"{key}.keep='best' has nothing to choose from: give validation images, and at "
                f"least {VALIDATION_EPOCHS} epochs, which are validated once; or set "
                f"{key}.keep='last'"
            )


def _uses_labels(method: object) -> bool:
    """Whether a method has a training with labels."""
    tuning = getattr(method, "tuning", None)
    if getattr(method, "objective", getattr(tuning, "objective", None)) == "labels":
        return bool(getattr(method, "fine_tune", True))
    recipes = (getattr(method, name, None) for name in ("gating", "fine_tuning"))
    return any(getattr(recipe, "epochs", 0) for recipe in recipes)


def _check_method(
    model: Given, method: Method, target: Target, name: str, found: Identified
) -> None:
    """Refuse a network or a target that the method cannot work on."""
    table = _unmeasured if target.is_time else None
    cost = shared_cost(model.shared_skeleton(), model.spec().size, table)
    try:
        if not target.is_time:
            method.check(cost, target)
        if not target.is_identity:
            check_scorer(scorer_of(method, model.skeleton(), cost, target))
    except VitrimError as error:
        unsuitable = isinstance(error, UnsupportedArchitecture) or not cost.structure.branches
        raise type(error)(f"{error}{_hint(model, cost, name) if unsuitable else ''}") from None


def _unmeasured() -> LatencyTable:
    raise ConfigError("the latency is not measured yet")


def _hint(model: Given, cost: Cost, chosen: str) -> str:
    """Return which methods can compress the network, as they stand in conf/method/."""
    suitable = []
    for name in method_names():
        with suppress(VitrimError):
            method = build_method(name, network=model.name)
            if name != chosen and can_compress(method, cost, model.skeleton()):
                suitable.append(name)
    names = ", ".join(suitable)
    return f"; methods that can compress {model.name}: {names}" if names else ""


@cache
def _run_yaml() -> dict[str, Any]:
    """Return the keys of conf/run.yaml that are plain values."""
    content = OmegaConf.to_container(OmegaConf.load(CONF / "run.yaml"), resolve=False)
    return cast(dict[str, Any], content)


def latency_settings() -> dict[str, Any]:
    """Return how the command measures latency."""
    return dict(_run_yaml()["latency"])


def _batch_size() -> int:
    """Return the command's number of images in a batch."""
    content = OmegaConf.load(CONF / "data" / "base" / "images.yaml")
    return int(content.batch_size)


def _table(model: Given, out: Path, *, on_gpu: bool) -> Callable[[], LatencyTable]:
    """Return what measures the table that predicts latency on this device, once."""
    latency = latency_settings()
    measure = partial(
        load_or_measure,
        writable(out / PHASES),
        model.build(),
        model.description(),
        model.spec().size,
        grid=LatencyGrid(**latency["table"]),
        batch=latency["batch"],
        repeats=latency["repeats"],
        device="cuda" if on_gpu else "cpu",
    )
    return cache(measure)

"""What is wrong with the choices of a run, found before anything expensive begins."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vitrim.cli.config_files import CONF
from vitrim.cli.results import check_metric
from vitrim.errors import (
    ConfigError,
    MissingPackage,
    VitrimError,
    is_count,
    is_positive,
    is_rate,
    require_package,
    shown,
)
from vitrim.files import MANIFEST, WEIGHTS, sha256

if TYPE_CHECKING:
    from vitrim.budget.cost import Cost
    from vitrim.budget.target import Target
    from vitrim.data import Data
    from vitrim.model.source import Timm
    from vitrim.pipeline import Job, Start
    from vitrim.plan import Plan
    from vitrim.trainer.phase import Scorer

Config = dict[str, Any]
"""A configuration, or a part of it, as plain data."""
TRACKING: Mapping[str, str | None] = {
    **dict.fromkeys(("offline", "online"), "wandb"),
    **{"tensorboard": "tensorboard", "csv": None, "mlflow": "mlflow", "none": None},
}
"""What a run can be tracked by, and the package that it needs."""

HEADS = ("runs", "fused", "padded", "fastest")
"""How cut attentions may be run where latency is measured; the last one not in training."""

_MAX_SEED, _MAX_BATCH, _MAX_REPEATS = 2**32 - 1, 2**16, 10**6


def _is_seed(value: object) -> bool:
    """Whether every generator of random numbers takes `value`."""
    return type(value) is int and 0 <= value <= _MAX_SEED


def check_shape(cfg: Config) -> list[str]:
    """Return what is wrong with the groups of keys: one that is a value, or lacks a key."""
    known = yaml.safe_load((CONF / "run.yaml").read_text(encoding="utf-8"))
    choices: Config = {key: {} for key in ("model", "method", "data", "trainer", "teacher")}
    for key in ("defaults", "hydra"):
        del known[key]
    return [*_misshapen(cfg, {**known, **choices}, "")]


def _misshapen(node: Config, known: Config, where: str) -> Iterator[str]:
    for name, below in known.items():
        key = f"{where}{name}"
        if name not in node:
            way_out = "" if below != {} else f": {key}=CHOICE; vitrim --help lists them"
            yield f"{key}: missing, it must not be deleted or null{way_out}"
        elif isinstance(below, dict) and not isinstance(node[name], dict):
            way_out = f"{key}.KEY=VALUE" if below else f"{key}=CHOICE; vitrim --help lists them"
            yield f"{key}={shown(node[name])}: expected keys and values: {way_out}"
        elif isinstance(below, dict):
            yield from _misshapen(node[name], below, f"{key}.")


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


def check_keys(cfg: Config) -> list[str]:
    """Return what is wrong with the keys outside the groups."""
    from vitrim.jobs.distributed import cores

    count, truth, latency = "a whole number from 1 on", "true or false", cfg["latency"]
    seed, tracking, progress = cfg["seed"], cfg["tracking"], cfg["progress"]
    images, start = cfg["batchnorm_images"], cfg["from_run"]
    heads, precision = latency["heads"], latency["precision"]
    rules = (
        ("seed", seed, "a whole number from 0 to 4294967295", _is_seed(seed)),
        ("tracking", tracking, f"one of {', '.join(TRACKING)}", str(tracking) in TRACKING),
        ("out", cfg["out"], "the name of a folder", _is_path(cfg["out"])),
        ("from_run", start, "null or the name of a folder", start is None or _is_path(start)),
        ("progress", progress, truth, isinstance(progress, bool)),
        ("control", cfg["control"], truth, isinstance(cfg["control"], bool)),
        ("heads", cfg["heads"], f"one of {', '.join(HEADS[:-1])}", cfg["heads"] in HEADS[:-1]),
        ("batchnorm_images", images, count, is_count(images)),
        *(
            (f"latency.{key}", value, f"{count}, up to {most:,}", is_count(value) and value <= most)
            for key, value, most in (
                ("batch", latency["batch"], _MAX_BATCH),
                ("repeats", latency["repeats"], _MAX_REPEATS),
            )
        ),
        *(
            (f"latency.{key}", latency[key], truth, isinstance(latency[key], bool))
            for key in ("blocks", "graphs")
        ),
        ("latency.heads", heads, f"one of {', '.join(HEADS)}", heads in HEADS),
        ("latency.precision", precision, "null, fp32 or bf16", precision in (None, "fp32", "bf16")),
    )
    wrong = [
        f"{key}={shown(value)}: expected {allowed}"
        for key, value, allowed, fits in rules
        if not fits
    ]
    if latency["graphs"] is True and not str(latency["device"]).startswith("cuda"):
        wrong.append("latency.graphs=true: CUDA graphs need a GPU: set latency.device=cuda")
    if precision == "bf16" and cfg["quantize"]:
        wrong.append("latency.precision=bf16: int8 networks are timed in fp32: leave quantize out")
    every, limit = cfg["checkpoint"]["minutes"], cfg["sweep"]["minutes"]
    if not is_rate(every):
        wrong.append(f"checkpoint.minutes={shown(every)}: expected a number from 0 on")
    if limit is not None and not is_positive(limit):
        wrong.append(f"sweep.minutes={shown(limit)}: expected null or a number above 0")
    jobs, wait = cfg["sweep"]["jobs"], cfg["sweep"]["wait_minutes"]
    if jobs is not None and not is_count(jobs):
        wrong.append(f"sweep.jobs={shown(jobs)}: expected null or a whole number from 1 on")
    if wait is not None and not is_positive(wait):
        wrong.append(f"sweep.wait_minutes={shown(wait)}: expected null or a number above 0")
    threads, most = cfg["threads"], cores()
    if threads is not None and not (is_count(threads) and threads <= most):
        allowed = f"null or a number from 1 to {most}, the cores of this process"
        wrong.append(f"threads={shown(threads)}: expected {allowed}")
    return [*wrong, *_check_tracking(tracking), *check_metric(cfg), *_check_quantize(cfg)]


def one_process(trainer: Mapping[str, Any]) -> None:
    """Raise ConfigError if the jobs of a local sweep would be of several processes each."""
    from vitrim.jobs.distributed import requested_processes

    if requested_processes(trainer) > 1 or trainer.get("num_nodes", 1) > 1:
        raise ConfigError(
            f"trainer.devices={trainer['devices']} (strategy {trainer.get('strategy')}) in a local "
            "sweep: run its jobs one by one without -m, each under torchrun if you like, submit "
            "the sweep with hydra/launcher=slurm, or set trainer.devices=1"
        )


def _check_tracking(tracking: object) -> list[str]:
    package = TRACKING.get(tracking) if isinstance(tracking, str) else None
    try:
        if package is not None:
            require_package(package, f"tracking={tracking}")
    except MissingPackage as error:
        return [f"{error}, or tracking=none"]
    return []


def _check_quantize(cfg: Config) -> list[str]:
    if cfg["quantize"] == []:
        return []
    from vitrim.deploy import quantize

    try:
        quantize.check(cfg["quantize"], accelerator=cfg["trainer"].get("accelerator", "auto"))
    except ConfigError as error:
        return [str(error)]
    return []


def start(folder: str | None, model: Timm, *, retrains: bool, seed: int) -> Start | None:
    """Return the compact network to start from, and its plan; None where there is none.

    If the network `retrains` on other data, its classifier is drawn by `seed`, for the model's
    classes.

    Raises:
        VitrimError: no folder of a run, damaged, or of another network.
    """
    from vitrim.model.transfer import with_new_head, without_classes
    from vitrim.pipeline import Start
    from vitrim.store import load

    if folder is None:
        if retrains:
            raise ConfigError(
                "from_run=null: this method trains the network of an earlier run: from_run=FOLDER"
            )
        return None
    if not (Path(folder) / MANIFEST).is_file():
        raise ConfigError(
            f"from_run={folder}: not the folder of a finished run (the one with report.json)"
        )
    net, plan = load(folder)
    if any(plan.int8s()):
        raise ConfigError(
            f"from_run={folder}: its network has int8 layers, which cannot be cut or trained: "
            "choose a run whose network is in float"
        )
    dense = model.description()
    alike = without_classes(plan.model) == without_classes(dense)
    if not (alike if retrains else plan.model == dense):
        raise ConfigError(
            f"from_run={folder} was cut from {plan.model}, this run's model is {dense}: "
            f"choose the same model{', or method=transfer for a new head' if alike else ''}"
        )
    if retrains:
        net, plan = with_new_head(net, plan, dense, model.n_classes, seed=seed)
    return Start(net.float(), plan)  # the images are in float32


def with_outputs(
    data: Data | None, model: Timm, from_run: str | None, *, retrains: bool
) -> Data | None:
    """Return `data` with the outputs of the network as labels, by name where names are known.

    Raises:
        VitrimError: the network does not know a class.
    """
    from vitrim.data.outputs import for_network
    from vitrim.deploy.runfolder import read_classes

    if data is None:
        return None
    folder, loaded = None, model.trained and not retrains
    owner = f"model.name={model.name}"
    if from_run is not None and not retrains:
        folder, loaded, owner = Path(from_run), True, f"from_run={from_run}"
    elif loaded and model.checkpoint is not None:
        folder, owner = Path(model.checkpoint), f"model.checkpoint={model.checkpoint}"
        folder = folder.parent if folder.name == WEIGHTS else folder
    known = [] if folder is None else read_classes(folder) or _named_in(folder, data)
    return for_network(
        data, model.n_classes, known=known, loaded=loaded, owner=f"the network of {owner}"
    )


def _named_in(folder: Path, data: Data) -> list[str]:
    """Return the names of outputs in config.json, if those of all classes are among them."""
    from vitrim.data.outputs import class_names
    from vitrim.model.checkpoint import description_in

    names, wanted = description_in(str(folder)).classes, class_names(data)
    return [*names] if wanted and {*wanted} <= {*names} else []


def network_digest(folder: str | None) -> str | None:
    """Return what tells the network saved in `folder` from others, wherever the folder is."""
    return None if folder is None else sha256(Path(folder) / MANIFEST)


def mismatches(job: Job, cfg: Config, choices: Mapping[str, str | None]) -> list[str]:
    """Return why the parts of a job do not go together, one sentence each."""
    problems = [*_check_target(job, cfg, choices["method"]), *_check_smooth(job)]
    problems += _check_control(job, choices["method"])
    if job.heads != "runs" and job.data is None:
        problems.append(f"heads={job.heads}: data=none has no images to train on: set heads=runs")
    if job.data is None:
        return [*problems, *(["data=none has no images, and this method trains"] * job.retrains)]
    if job.data.n_classes != job.model.n_classes:
        from vitrim.data.outputs import listed

        problems.append(
            f"data={choices['data']} has {listed(job.data)}, the head of "
            f"model={choices['model']} has {job.model.n_classes}: set "
            f"model.num_classes={job.data.n_classes} (and model.reset_head=true "
            "with a checkpoint of other classes), or choose other data"
        )
    trains = job.retrains or not job.model.trained or not job.target.is_identity
    if (trains or job.control) and not job.data.trainable:
        problems.append(
            f"data.root={cfg['data'].get('root')}: no training split: this run needs training "
            "images (to train, or to rank units)"
        )
    try:
        job.data.module(job.model.spec())
    except ConfigError as error:
        problems.append(str(error))
    return problems


def _check_control(job: Job, method: str | None) -> list[str]:
    """Return why there is nothing that the dense network could be trained by for comparison."""
    if not job.control:
        return []
    if job.data is None:
        return ["control=true: data=none has no images to train the dense network on"]
    if job.start is not None:
        return [
            "control=true: the network of a from_run has a training of its own behind it, which "
            "the dense network would lack: set control=false"
        ]
    if not any(recipe.epochs for recipe in job.control_recipes):
        return [
            f"control=true: method={method} does not train with labels here, so the dense network "
            "is what to compare with: set control=false"
        ]
    return []


def _check_smooth(job: Job) -> list[str]:
    """Return why an int8 scheme that scales by activations does not fit the network or images."""
    from vitrim.deploy.quantize import SMOOTH, check_smooth

    try:
        if SMOOTH in job.quantize:
            trainable = job.data is not None and job.data.trainable
            check_smooth(job.model.shared_skeleton(), trainable=trainable)
    except VitrimError as error:
        return [str(error)]
    return []


def _check_target(job: Job, cfg: Config, name: str | None) -> list[str]:
    """Return why the method cannot meet the target on this network."""
    from vitrim.budget.cost import Cost, shared_cost
    from vitrim.cli.suitable import hint
    from vitrim.method import scorer_of
    from vitrim.network import UnsupportedArchitecture
    from vitrim.trainer.phase import check_scorer

    model, method, target = job.model, job.method, job.target
    problems = []
    try:
        cost = shared_cost(model.shared_skeleton(), model.spec().size, job.latency_table)
    except VitrimError as error:
        return [str(error)]
    own, net = cost, model.skeleton()
    try:
        if job.start is None:
            method.check(cost, target)
        elif target.is_time:
            problems.append(
                f"target.{target.metric}: latency is predicted for dense networks only, not for a "
                "from_run: choose target.macs"
            )
        else:
            problems += _nothing_left(cfg["from_run"], cost, job.start.plan, target)
            own, net = Cost(job.start.net, cost.input_size, cost), copy.deepcopy(job.start.net)
            method.check(own, target)
        if not target.is_identity:
            scorer = check_scorer(scorer_of(method, net, own, target))
            problems += _check_accumulation(scorer, cfg["trainer"], name)
    except VitrimError as error:
        unsuitable = isinstance(error, UnsupportedArchitecture) or not cost.structure.branches
        problems.append(f"{error}{hint(cost, model, name) if unsuitable else ''}")
    return problems


def _check_accumulation(scorer: Scorer, trainer: Config, name: str | None) -> list[str]:
    """Return why the gradients of a scorer cannot be accumulated, where they are to be."""
    from vitrim.trainer.phase import Steps
    from vitrim.trainer.trainer_options import not_accumulated

    number = trainer.get("accumulate_grad_batches", 1)
    refused = number != 1 and isinstance(scorer, Steps) and scorer.own_steps
    return [not_accumulated(f"the scoring of method={name}", number)] if refused else []


def _nothing_left(folder: str, cost: Cost, start: Plan, target: Target) -> list[str]:
    """Return what is wrong with a target that the network to start from meets already."""
    if target.is_identity or target.metric == "units":
        return []
    metric, limit = target.counted_metric, cost.limit(target)
    has, dense = cost.plan(start).of(metric), cost.total(metric)
    if has > limit:
        return []
    return [
        f"target.{target.metric}={target.keep} leaves {limit:,} {target.unit}, and from_run="
        f"{folder} has only {has:,} already ({has / dense:.4f} of the dense network's): set a "
        "smaller target"
    ]

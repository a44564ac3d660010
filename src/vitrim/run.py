"""The command `vitrim`: from a network to a compact one and the report of what it cost.

    dense --scorer--> evidence --plan--> plan --cut--> compact --recovery--> measured, saved,
    reported

This is the only file that knows Hydra. torch is imported when a run starts, not before, so that
`vitrim --help` answers at once.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial, wraps
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vitrim import checks, cluster, signals, status, sweep
from vitrim.atomic import write
from vitrim.errors import ConfigError, VitrimError

if TYPE_CHECKING:
    from torch import nn

    from vitrim.timing import Timing
    from vitrim.trainer.fit import Phases

_log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", ".*version_base parameter is deprecated.*")  # Hydra 1.3 needs it
warnings.filterwarnings("ignore", r"[\s\S]*_execution_whitelist_")  # of 1.4: `checks` has a list
_HERE = Path(__file__).parent
CONF = next(path for path in (_HERE / "conf", _HERE.parents[1] / "conf") if path.is_dir())
GROUPS = ("model", "method", "data", "trainer")
TIMES = ("latency", "latency_ms")  # budgets that hang on where they were measured
NOT_RECIPE = ("out", "tracking", "progress", "latency", "checkpoint", "sweep")
"""Keys that change where and how, not what."""
TO_TIMM = ("model.args", "data.augmentation")
"""Keys below which stand arguments of timm's functions, those that conf/ does not name as well."""
PHASES = "phases"
_register: Callable[..., None] = (  # omegaconf 2.4 gave the new function the old one's name
    OmegaConf.register_resolver
    if "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    else OmegaConf.register_new_resolver
)
_register("gpus", cluster.gpus, replace=True)  # of hydra/launcher/slurm.yaml


def run(cfg: DictConfig) -> Path:
    """Compress one network as `cfg` says; print and return the path of its report.json."""
    from vitrim import processes
    from vitrim.data import quarantine
    from vitrim.trainer.fit import lock

    choices = _build(cfg)
    recipe = _recipe(cfg, choices["model"].fingerprint(), checks.identity(cfg.from_run))
    folder: Path = recipe["earlier"] or (
        Path(cfg.out).absolute() / recipe["series"] / recipe["name"]
    )
    report = folder / "report.json"
    with processes.joined(recipe["resolved"]["trainer"]), lock(_writable(folder)):
        first = processes.first()
        if processes.agreed(report.is_file()):
            _log.info("finished before; delete the folder to run it again")
            if first:
                status.tell(folder, "DONE")
        elif first:
            checks.same_recipe(folder / "recipe.yaml", recipe["resolved"], apart=NOT_RECIPE)
            text = OmegaConf.to_yaml(cfg, resolve=True)
            with status.told(folder), quarantine.listing(choices["data"], folder):
                write(folder / "recipe.yaml", lambda path: path.write_text(text))
                _compress(cfg, choices, recipe, folder)
        else:
            _compress(cfg, choices, recipe, folder)
    if first:
        sys.stdout.write(f"{report}\n")
        sys.stdout.flush()
    return report


def _compress(
    cfg: DictConfig, choices: Mapping[str, Any], recipe: Mapping[str, Any], folder: Path
) -> None:
    """Go from the network to the compact one and its report in `folder`."""
    from lightning import seed_everything

    from vitrim import processes, quantize
    from vitrim.data import quarantine
    from vitrim.dream import METRIC_SET, sheet
    from vitrim.measure import latencies, record
    from vitrim.paper import flops_blog
    from vitrim.plan import Plan
    from vitrim.store import save
    from vitrim.surgery import compose, cut
    from vitrim.target import Cost
    from vitrim.trainer.classify import Classify
    from vitrim.trainer.prune import Prune
    from vitrim.transfer import origin

    started = time.perf_counter()
    model, method, data = choices["model"], choices["method"], choices["data"]
    if data is not None and data.chosen and processes.first():
        (folder / "samples.txt").write_text("\n".join([*data.chosen, ""]))
    phases = _phases(cfg, choices, recipe, folder)
    seed_everything(cfg.seed, verbose=False)  # for weights drawn anew
    judged = phases if model.sourced or not cfg.transfer else None
    dense, dense_accuracy = _dense(model, data, judged, recipe)
    cost = Cost(dense, model.spec().size, timing=choices["timing"])
    identity = Plan(model={}, edits=())
    start, plan = choices["start"] or (dense, identity)
    recovery: Iterable[Any] = ()
    if method.budget.is_identity:
        compact = cut(start, identity)
        if cfg.transfer:
            recovery = [Classify(compact, recipe=model.training, n_classes=data.n_classes)]
    else:
        prune = Prune(method, cost if start is dense else Cost(start, cost.input_size, cost))
        _score(method.scorer(copy.deepcopy(start)), prune, phases, recipe)
        plan = prune.plan if start is dense else compose(dense, plan, prune.plan)
        compact = prune.compact
        if METRIC_SET in prune.evidence.moments and processes.first():
            images = prune.evidence.moments[METRIC_SET]["images"]
            sheet(images, model.spec(), folder / "metric_set.png")
        if prune.plan.edits and phases is not None:
            recovery = method.recovery(compact, dense, prune.evidence, data.n_classes)
    stages = {"cut": dense_accuracy}
    if (plan.edits or cfg.transfer) and phases is not None:
        stages["cut"] = phases.judged(folder / PHASES / "cut", compact, data.n_classes)
        for phase in recovery:
            name = _title(phase, stages)
            phases.once(folder / PHASES / name, phase, name=name)
            stages[name] = phases.judged(folder / PHASES / name, compact, data.n_classes)
    in_int8: dict[str, Any] = {}
    if cfg.quantize:
        judge = partial(phases.accuracy, n_classes=data.n_classes) if phases else None
        in_int8 = quantize.record(compact, cfg.quantize, judge)
    if not processes.first():
        return
    plan = Plan(
        model=model.description(),
        edits=plan.edits,
        provenance={**plan.provenance, "seed": cfg.seed, "recipe_hash": recipe["hash"]},
    )
    save(folder, compact, plan)
    times = latencies([dense, compact], model.spec().size, **cfg.latency)
    report = record((dense, compact), cost, plan, times, dense_accuracy, stages, method.budget)
    for side, part in (("dense", identity), ("compact", plan)):
        counted = flops_blog(model.name, cost, part)
        report[side] |= {} if counted is None else {"flops_blog": counted}
    if choices["timing"] is not None:
        report["foretold"] = choices["timing"]().foretold(cost.structure, plan)
    report |= {
        **in_int8,
        **recipe["report"],
        "variant": origin(plan) if cfg.transfer else _variant(),
        "latency": OmegaConf.to_container(cfg.latency),
        **quarantine.counted(data),
        "seconds": {"total": round(time.perf_counter() - started, 3)},
    }
    _finish(folder, report, phases)


def _dense(
    model: Any, data: Any, phases: Phases | None, recipe: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, float] | None]:
    """Return the dense network, trained here if its weights come from nowhere, and its accuracy."""
    from vitrim.trainer.classify import Classify

    if phases is None:  # structure only: no download for weights that nobody looks at
        return model.build(fetch=False), None
    net = model.build()
    folder = phases.shared / f"dense-{recipe['dense_key']}"
    if not model.trained:
        phase = Classify(net, recipe=model.training, n_classes=data.n_classes)
        phases.once(folder, phase, name="dense")
    accuracy = phases.judged(folder, net, data.n_classes)
    return net.eval(), accuracy


def _title(phase: Any, stages: Mapping[str, Any]) -> str:
    """Return the name of a phase; of several of a kind, the later ones have numbers."""
    kind = type(phase).__name__.lower()
    turn = 1 + sum(name.split("-")[0] == kind for name in stages)
    return kind if turn == 1 else f"{kind}-{turn}"


def _score(scorer: Any, prune: Any, phases: Phases | None, recipe: Mapping[str, Any]) -> None:
    """Let the scorer learn, once for all strengths, and the callback plan and cut."""
    from vitrim.trainer.fit import digest

    if phases is None:
        prune.apply(scorer)
        return
    key = digest([recipe["start_key"], type(scorer).__qualname__, scorer.settings])
    phases.once(phases.shared / f"score-{key}", scorer, name="score", callbacks=[prune])


def _finish(folder: Path, report: dict[str, Any], phases: Phases | None) -> None:
    """Write the report; what was kept to go on from is not needed any more."""
    if phases is not None:
        phases.tracker.close(report)
    text = json.dumps(report, indent=1, sort_keys=True, allow_nan=False)
    write(folder / "report.json", lambda path: path.write_text(text))
    shutil.rmtree(folder / PHASES, ignore_errors=True)


def _build(cfg: DictConfig) -> dict[str, Any]:
    """Build what the four groups choose; all that is wrong with them is told at once."""
    said: Any = OmegaConf.to_container(cfg, resolve=False)
    built, wrong = _groups(cfg, GROUPS)
    problems = [*checks.of_run(said), *wrong]
    if not problems:
        built |= {"start": None, "timing": None}
        try:
            built["start"] = checks.start(
                said["from_run"], built["model"], transfer=cfg.transfer, seed=cfg.seed
            )
            if built["method"].budget.is_time:
                built["timing"] = cache(partial(_timing, cfg, built["model"]))
        except VitrimError as error:
            problems.append(str(error))
    if not problems:
        problems = checks.mismatches(said, built, {group: _choice(group) for group in GROUPS})
    if problems:
        raise ConfigError("\n".join(problems))
    return built


def _timing(cfg: DictConfig, model: Any) -> Timing:
    """Return how long parts of the dense network take on this device, measured once."""
    from vitrim.timing import once

    shared = _writable(Path(cfg.out).absolute() / PHASES)
    how = {key: cfg.latency[key] for key in ("batch", "repeats", "device")}
    return once(shared, model.build(fetch=False), model.description(), model.spec().size, **how)


def _groups(cfg: DictConfig, groups: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Build what these groups choose; return it by group, and what is wrong with the others."""
    built, problems = {}, []
    for group in groups:
        try:
            values = OmegaConf.to_container(cfg[group], resolve=True, throw_on_missing=True)
            checks.targets(values, group)
            built[group] = instantiate(values, _convert_="all")
        except (InstantiationException, OmegaConfBaseException, ConfigError) as error:
            problems.append(_reason(error, group))
    return built, problems


def chosen(
    config: str, arguments: Sequence[str], recipe: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compose conf/`config`.yaml for a command that judges the finished run of `recipe`.

    Return it as plain data, with the name of the data under `choices`, and what its groups data
    and trainer build, beside the model of that run.

    Raises:
        ConfigError: what is wrong with the choices.
    """
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = hydra.compose(config, overrides=[*arguments], return_hydra_config=True)
        choices = {group: cfg.hydra.runtime.choices[group] for group in ("data", "trainer")}
        with open_dict(cfg):
            del cfg.hydra
            cfg.model = OmegaConf.load(recipe).model
        said: Any = OmegaConf.to_container(cfg, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, arguments, config)) from None
    built, problems = _groups(cfg, ("data", "trainer", "model"))
    if problems:
        raise ConfigError("\n".join(problems))
    return {**said, "choices": choices}, built


def _phases(
    cfg: DictConfig, choices: Mapping[str, Any], recipe: Mapping[str, Any], folder: Path
) -> Phases | None:
    from vitrim import processes
    from vitrim.trainer.fit import Phases
    from vitrim.trainer.tracking import Tracker

    if choices["data"] is None:
        return None
    return Phases(
        trainer=choices["trainer"],
        data=choices["data"].module(choices["model"].spec()),
        tracker=Tracker(
            folder,
            cfg.tracking if processes.first() else "none",
            group=recipe["series"],
            config=recipe["resolved"],
        ),
        folder=folder,
        shared=_writable(Path(cfg.out).absolute() / PHASES),
        seed=cfg.seed,
        progress=cfg.progress,
        checkpoint_minutes=cfg.checkpoint.minutes,
    )


def _recipe(cfg: DictConfig, fingerprint: str | None, started_from: str | None) -> dict[str, Any]:
    """Return the resolved recipe, its hashes, and the names of its series and run."""
    from vitrim.measure import versions
    from vitrim.trainer.fit import digest

    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    choices = {group: _choice(group) for group in (*GROUPS, "experiment")}
    if cfg.transfer:
        choices["method"] = "transfer"
    addressed = _identifying(resolved, fingerprint, started_from)
    recipe = {"choices": {group: choices[group] for group in ("data", "method")}}
    recipe |= _without_addresses(addressed)
    series = copy.deepcopy(recipe)
    for key in ("strength", "target", "seed"):
        series.pop(key)
        series["method"].pop(key, None)
    series["data"].pop("samples_seed", None)
    chosen = [name for name, keep in resolved["target"].items() if keep is not None]
    point = "-".join(f"{name}{resolved['target'][name]}" for name in chosen) or f"s{cfg.strength:g}"
    label = "-".join(str(choices[group]) for group in ("model", "data", "method"))
    dense = {key: recipe[key] for key in ("model", "data", "trainer", "seed", "checkpoint_sha256")}
    dense["choices"] = {"data": choices["data"]}
    recipe_hash, series_name = digest(recipe), f"{label}-{digest(series)}"
    name = f"{point}-seed{cfg.seed}"
    return {
        "resolved": resolved,
        "hash": recipe_hash,
        "dense_key": digest(dense),
        "start_key": digest([dense, started_from]) if started_from else digest(dense),
        "series": series_name,
        "name": f"{name}-{recipe_hash}",
        "earlier": _earlier(Path(cfg.out), label, name, addressed),
        "report": {
            "choices": choices,
            "strength": None if chosen else cfg.strength,
            "seed": cfg.seed,
            "samples": resolved["data"].get("samples"),
            "recipe_hash": recipe_hash,
            "series": series_name,
            **versions(*(("torchao",) if cfg.quantize else ())),
        },
    }


def _identifying(
    resolved: Mapping[str, Any], fingerprint: str | None, started_from: str | None
) -> dict[str, Any]:
    """Return the part of a resolved recipe that decides the result of the run."""
    recipe = copy.deepcopy({k: v for k, v in resolved.items() if k not in NOT_RECIPE})
    for key in ("quantize", "transfer"):  # folders of runs without them keep their names
        if not recipe[key]:
            del recipe[key]
    for part in (recipe, recipe["method"]):
        if "target" in part:
            part["target"] = {k: v for k, v in part["target"].items() if k not in TIMES or v}
    if any(map(recipe["target"].get, TIMES)):
        recipe["latency"] = {key: resolved["latency"][key] for key in ("batch", "device")}
    if recipe["data"].get("samples") is None:
        drawing = ("samples", "samples_seed")
        recipe["data"] = {key: value for key, value in recipe["data"].items() if key not in drawing}
        recipe["method"].get("sampling", {}).pop("given", None)
    if recipe["data"].get("bad_images", {}).get("evaluation") == "fail":  # judged on all, as ever
        del recipe["data"]["bad_images"]
    recipe["checkpoint_sha256"] = fingerprint
    recipe["from_run"] = started_from
    if started_from is None:
        del recipe["from_run"]
    return recipe


def _without_addresses(node: Any) -> Any:
    """Return `node` without the addresses of classes, which may move."""
    if isinstance(node, dict):
        return {key: _without_addresses(value) for key, value in node.items() if key != "_target_"}
    return [_without_addresses(item) for item in node] if isinstance(node, list) else node


def _earlier(out: Path, label: str, name: str, recipe: Mapping[str, Any]) -> Path | None:
    """Return the folder of this run as version 0.1.0 named it, if it finished there.

    That version hashed the addresses of classes with the recipe.
    """
    from vitrim.trainer.fit import digest

    for report in sorted(out.absolute().glob(f"{escape(label)}-*/{escape(name)}-*/report.json")):
        folder = report.parent
        try:
            known: Any = yaml.safe_load((folder / "recipe.yaml").read_text())
            begun = _identifying(known, recipe["checkpoint_sha256"], recipe.get("from_run"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
            continue
        same = _without_addresses(begun) == _without_addresses(recipe)
        if same and folder.name == f"{name}-{digest(begun)}":
            return folder
    return None


def _variant() -> str:
    """Return what the command line says of the method, beyond its name."""
    said = [word for word in HydraConfig.get().overrides.task if word.startswith("method.")]
    return " ".join(sorted(word.removeprefix("method.") for word in said))


def _choice(group: str) -> str | None:
    name: str | None = HydraConfig.get().runtime.choices.get(group)
    return name


def _writable(folder: Path) -> Path:
    """Make `folder` and return it, once a file could be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"out: cannot write to {folder} ({error}); out=DIR moves it") from None
    return folder


def _reason(error: Exception, group: str) -> str:
    """Return the sentence that a user needs, out of Hydra's wrapping."""
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=???: expected a value, which has no default"
    text = str(error).split("\n    full_key:")[0].strip()
    return text if isinstance(error, VitrimError) else f"{group}: {text}"


def _explain(error: Exception, arguments: Sequence[str], config: str = "run") -> str:
    """Return the message of an error in composing or running, with the way out."""
    text = str(error)
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown is not None:
        full = str(getattr(error.__cause__, "full_key", None))
        key = full if full.startswith(f"{unknown[1]}.") else unknown[1]  # within a value {key: ...}
        parent, _, _ = key.rpartition(".")
        known = _known_keys(parent, arguments, config)
        ways = [f"expected one of {', '.join(known)}"] if known else []
        ways += [f"+{key}=... hands it to timm"] if parent in TO_TIMM else []
        return f"unknown key {key}: {'; '.join(ways)}"
    if "Config search path" in text:
        return text.split("Config search path")[0].strip()
    if isinstance(error, OSError) and error.filename is not None:
        return f"out: cannot write to {error.filename} ({error.strerror}); out=DIR moves it"
    return text


def _mendable() -> tuple[type[Exception], ...]:
    """Return the errors whose message is all that a user needs."""
    return (VitrimError, HydraException, OmegaConfBaseException, OSError, *cluster.failures())


def _known_keys(parent: str, arguments: Sequence[str], config: str) -> list[str]:
    """Return the keys below `parent`, or below what there is of it, in what was asked for."""
    kinds = (*GROUPS, "experiment")
    groups = [arg for arg in arguments if arg.partition("=")[0] in kinds and "," not in arg]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose(config, overrides=groups)
    while parent and OmegaConf.select(cfg, parent) is None:
        parent = parent.rpartition(".")[0]
    return [str(key) for key in (OmegaConf.select(cfg, parent) if parent else cfg)]


def _checked(compose: Callable[..., DictConfig]) -> Callable[..., DictConfig]:
    """Return Hydra's way to a configuration, which refuses those that it would run code for.

    Hydra acts on its own part (callbacks, logging, launchers) before a job of ours begins, in
    every job of a sweep: this is the one place that all of them pass.
    """

    @wraps(compose)
    def composed(loader: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        for source in loader.get_sources():
            if source.provider == "command-line":
                checks.of_files(Path(source.path))
        cfg = compose(loader, *args, **kwargs)
        checks.of_hydra(OmegaConf.to_container(cfg.hydra, resolve=False))  # type: ignore[arg-type]
        return cfg

    return composed


_LOADS = (  # Hydra 1.4 has a way of its own to the same end, by which all of it goes
    "_load_configuration"
    if hasattr(ConfigLoaderImpl, "_load_configuration")
    else "load_configuration"
)
setattr(ConfigLoaderImpl, _LOADS, _checked(getattr(ConfigLoaderImpl, _LOADS)))


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="run")
def _job(cfg: DictConfig) -> str:
    hydra_cfg = HydraConfig.get()
    submitted = "submitit" in hydra_cfg.launcher._target_
    if hydra_cfg.mode == RunMode.MULTIRUN and not submitted:
        checks.one_process(cfg.trainer)
        return sweep.job(_words(), out=Path(cfg.out).absolute(), minutes=cfg.sweep.minutes)
    return str(cluster.job(partial(run, cfg)) if submitted else run(cfg))


def _words() -> list[str]:
    """Return the command line of one job of a sweep."""
    cfg = HydraConfig.get()
    of_sweeps = ("hydra.mode", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")
    kept = [word for word in cfg.overrides.hydra if not word.lstrip("+~").startswith(of_sweeps)]
    sources = [at for at in cfg.runtime.config_sources if at.provider == "command-line"]
    own = [word for at in sources for word in ("--config-dir", str(at.path))]
    return [*own, *kept, *cfg.overrides.task]


def main() -> None:
    """Run the command; what a user can mend ends in one message and exit code 1.

    A run that was told to stop ends with 143 or 75 (`vitrim.signals`).
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with signals.taken():
        try:
            cluster.prepare(sys.argv[1:])
            _job()
            signals.check()
        except signals.Preempted as error:
            sys.stderr.write(f"vitrim: {error}\n")
            sys.exit(error.code)
        except _mendable() as error:
            message = _explain(error, sys.argv[1:])
            status.refused(message)
            sys.exit(f"vitrim: {message}")


if __name__ == "__main__":
    main()

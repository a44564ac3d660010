"""From a command line to a configuration, and from that to a job."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vitrim.cli import checks, guard, hardware, plugins
from vitrim.cli.arguments import PATHS, at_home, quoted
from vitrim.cli.checks import Config
from vitrim.cli.config_files import CONF, leaves
from vitrim.cli.kept import keep_problems
from vitrim.cli.keys import group_problems, root_problems
from vitrim.cli.renamed import renamed_key
from vitrim.cli.teacher import problems_of, teacher_of
from vitrim.errors import ConfigError, VitrimError, missing_package, shown
from vitrim.files import PHASES, read_yaml, writable
from vitrim.jobs import slurm

if TYPE_CHECKING:
    from vitrim.budget.latency import LatencyTable
    from vitrim.budget.target import Target
    from vitrim.method import Method
    from vitrim.model.source import Timm
    from vitrim.pipeline import Job

_log = logging.getLogger(__name__)
GROUPS = ("model", "method", "data", "trainer")
_FOLDER = ("--config-dir", "-cd")
TO_TIMM = ("model.args", "data.augmentation")
"""Keys whose children are arguments of timm's functions, those that conf/ does not name as well."""


def register_resolvers() -> None:
    """Register what interpolations in conf/ call."""
    register: Callable[..., None] = (  # omegaconf 2.4 gave the new function the old one's name
        OmegaConf.register_resolver
        if "replace" in inspect.signature(OmegaConf.register_resolver).parameters
        else OmegaConf.register_new_resolver
    )
    for function in (slurm.tasks_per_node, slurm.gpus_per_node):  # of hydra/launcher/slurm.yaml
        register(function.__name__, function, replace=True)


def build_job(cfg: DictConfig) -> Job:
    """Build what the groups choose and check that it goes together.

    Raises:
        ConfigError: all that is wrong with the choices, one sentence a line.
    """
    expand_home(cfg)
    raw = cast(Config, OmegaConf.to_container(cfg, resolve=False))
    check_groups(cfg)
    plugins.use(raw["plugins"], Path(HydraConfig.get().runtime.cwd))
    take_over(cfg)
    built, wrong = _build(cfg, GROUPS)
    try:
        built["teacher"] = teacher_of(cfg)
    except VitrimError as error:
        wrong.append(str(error))
    problems = [
        *root_problems(raw, CONF / "run.yaml", (*GROUPS, "teacher")),
        *checks.check_keys(raw),
        *hardware.check_device(cfg.latency.device),
        *wrong,
    ]
    if "method" in built:  # its target is checked with the other choices, whatever is wrong there
        try:
            built["target"] = _target(cfg, built["method"])
        except VitrimError as error:
            problems.append(str(error))
    if not problems:
        try:
            job = _assemble(cfg, built)
        except VitrimError as error:
            problems = [str(error)]
        else:
            choices = {group: choice(group) for group in GROUPS}
            problems = [*checks.mismatches(job, raw, choices), *problems_of(job, choices)]
            problems += keep_problems(job, raw)
            problems += hardware.try_run(job)
    if problems:
        raise ConfigError("\n".join(problems))
    return job


def check_groups(cfg: DictConfig) -> None:
    """Refuse groups of keys that are a value, or lack a key.

    Raises:
        ConfigError: all that is wrong with them, one sentence a line.
    """
    misshapen = checks.check_shape(cast(Config, OmegaConf.to_container(cfg, resolve=False)))
    if misshapen:
        raise ConfigError("\n".join(misshapen))


def take_over(cfg: DictConfig) -> None:
    """Fill keys of the model that are null with what the checkpoint's config.json says; log it.

    Raises:
        ConfigError: config.json is not JSON.
    """
    model = cfg.model
    checkpoint = OmegaConf.select(model, "checkpoint")
    if not isinstance(checkpoint, str) or not Path(checkpoint).is_dir():
        return
    from vitrim.model.checkpoint import description_in

    said = description_in(checkpoint).settings()
    if model.get("reset_head"):
        said.pop("num_classes", None)
    filled = {key: value for key, value in said.items() if key in model and model[key] is None}
    for key, value in filled.items():
        OmegaConf.update(model, key, value)
    if filled:
        words = ", ".join(f"model.{key}={shown(value)}" for key, value in filled.items())
        _log.info("taken over from %s: %s", Path(checkpoint) / "config.json", words)


def expand_home(cfg: DictConfig) -> None:
    """Replace `~` by the home folder in every path of a configuration.

    With hydra.job.chdir=true paths become absolute, since the run works in its folder.
    """
    moves = HydraConfig.initialized() and bool(HydraConfig.get().job.chdir)
    for key in PATHS:
        value = OmegaConf.select(cfg, key)
        if isinstance(value, str) and value.startswith("~"):
            OmegaConf.update(cfg, key, at_home(value))
        elif isinstance(value, str) and moves:
            OmegaConf.update(cfg, key, str(Path(value).absolute()))


def _target(cfg: DictConfig, method: object) -> Target:
    """Return the budget of the run, once `method` is known to be one."""
    from vitrim.budget.target import resolve_target
    from vitrim.method import check_method

    check_method(method)
    of_method = cast("Method", method)
    return resolve_target(
        cfg.strength,
        cast(Config, OmegaConf.to_container(cfg.target)),
        levels=of_method.levels,
        metric=of_method.metric,
        where=f"method={choice('method')}",
        several=bool(getattr(method, "several_budgets", False)),
    )


def _assemble(cfg: DictConfig, built: dict[str, Any]) -> Job:
    """Return the job of built groups and their target; the network to start from is loaded."""
    from vitrim.measure import LatencySettings
    from vitrim.pipeline import Job
    from vitrim.trainer.tracking import Wandb

    model, method, target = built["model"], built["method"], built["target"]
    out = Path(cfg.out).absolute()
    latency = cast(Config, OmegaConf.to_container(cfg.latency))
    grid = latency.pop("table")
    table = partial(_latency_table, model, latency, grid, out) if target.is_time else None
    retrains = method.granularity == "none"
    start = checks.start(cfg.from_run, model, retrains=retrains, seed=cfg.seed)
    return Job(
        model=model,
        method=method,
        target=target,
        data=checks.with_outputs(built["data"], model, cfg.from_run, retrains=retrains),
        trainer=built["trainer"],
        out=out,
        start=start,
        latency=LatencySettings(**latency),
        latency_table=None if table is None else cache(table),
        quantize=cast(list[str], OmegaConf.to_container(cfg.quantize)),
        seed=cfg.seed,
        tracking=cfg.tracking,
        wandb=Wandb(**cast(Config, OmegaConf.to_container(cfg.wandb, resolve=True))),
        progress=cfg.progress,
        checkpoint_minutes=cfg.checkpoint.minutes,
        batchnorm_images=cfg.batchnorm_images,
        control=cfg.control,
        heads=cfg.heads,
        teacher=built.get("teacher"),
        compiles=bool(cfg.trainer.get("compile")),
    )


def _latency_table(model: Timm, latency: Config, grid: Config, out: Path) -> LatencyTable:
    """Return the table that predicts latency on this device, measured once."""
    from vitrim.budget.latency import LatencyGrid, load_or_measure

    return load_or_measure(
        writable(out / PHASES),
        model.build(fetch=False),
        model.description(),
        model.spec().size,
        batch=latency["batch"],
        repeats=latency["repeats"],
        device=latency["device"],
        heads=latency["heads"],
        precision=latency["precision"],
        graphs=latency["graphs"],
        grid=LatencyGrid(**grid),
    )


def _build(
    cfg: DictConfig, groups: Iterable[str], *, saved: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Build what these groups choose; return it by group, and what is wrong with the others.

    Keys of the groups in `saved` are those of an earlier run, whatever they are called now.
    """
    built: dict[str, Any] = {}
    problems: list[str] = []
    for group in groups:
        try:
            values = OmegaConf.to_container(cfg[group], resolve=True, throw_on_missing=True)
            guard.check_targets(values, group)
            wrong = [] if group in saved else _wrong_keys(cast(Config, values), group)
            problems += wrong
            if not wrong:
                built[group] = _built(group, values)
        except (InstantiationException, OmegaConfBaseException, ConfigError) as error:
            problems.append(_reason(error, group))
    return built, problems


def _built(group: str, values: object) -> object:
    """Return what a group builds; data of other packages as runs read them."""
    if group == "trainer":  # compile is no option of Lightning's
        values = {k: v for k, v in cast(Config, values).items() if k != "compile"}
    value = instantiate(values, _convert_="all")
    if group != "data":
        return value
    from vitrim.data.own import as_data

    return as_data(value)


def _wrong_keys(values: Config, group: str) -> list[str]:
    """Return what is wrong with the keys of a group, and with numbers of processes."""
    from vitrim.jobs.distributed import check_processes, check_workers

    problems = group_problems(values, group)
    if group == "trainer":
        problems += hardware.check_trainer(values)
    if group == "trainer" and not problems:
        check_processes(values)
    if group == "data":
        check_workers(values.get("workers"))
    return problems


def compose_for_run(
    config: str, arguments: Sequence[str], recipe: Path
) -> tuple[Config, dict[str, Any]]:
    """Compose conf/`config`.yaml for a command that evaluates the finished run of `recipe`.

    Returns:
        The configuration as plain data, with the names of data and trainer under `choices`; and
        what its groups data and trainer build, with the model of that run.

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
            cfg.model = _model_of(recipe)
        expand_home(cfg)
        plugins.use(OmegaConf.to_container(cfg, resolve=False)["plugins"], Path.cwd())  # type: ignore[index,call-overload]
        raw = cast(Config, OmegaConf.to_container(cfg, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, arguments, config)) from None
    if "mixing" in cfg.data:  # evaluation mixes no images: any batch size will do
        with open_dict(cfg):
            cfg.data.mixing.update({"mixup_alpha": 0.0, "cutmix_alpha": 0.0})
    groups = ("data", "trainer", "model")
    unknown = root_problems(raw, CONF / f"{config}.yaml", groups)
    built, problems = _build(cfg, groups, saved=("model",))
    if unknown or problems:
        raise ConfigError("\n".join([*unknown, *problems]))
    return {**raw, "choices": choices}, built


def _model_of(recipe: Path) -> object:
    """Return the model of a recipe, which may be of others: plain data, nothing to resolve."""
    content = read_yaml(recipe)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or any("${" in str(value) for _, value in leaves(model)):
        raise ConfigError(f"{recipe}: model: expected the resolved model of a run")
    return model


def choice(group: str) -> str | None:
    """Return the name of what is chosen in a group."""
    name: str | None = HydraConfig.get().runtime.choices.get(group)
    return name


def _reason(error: Exception, group: str) -> str:
    """Return the sentence that a user needs, out of Hydra's wrapping."""
    key = group
    if missing := missing_package(error):
        return f"{group}={choice(group)}: {missing}"
    while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        part = re.search(r"full_key: (\S+)", str(error))
        key = group if part is None else f"{group}.{part[1]}"
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}=???: expected a value, which has no default"
    text = str(error).split("\n    full_key:")[0].strip()
    unexpected = re.search(r"unexpected keyword argument '([^']+)'", text)
    if unexpected is not None and (message := renamed_key(f"{key}.{unexpected[1]}")):
        return message
    return text if isinstance(error, VitrimError) else f"{group}: {text}"


def explain(error: Exception, arguments: Sequence[str], config: str = "run") -> str:
    """Return the message of an error in composing or running, with the way out."""
    text = str(error).replace("\t", "  ")
    if isinstance(error, RecursionError):
        return "the configuration is nested too deeply"
    special = _special_characters(error)
    if special is not None:
        return special
    unknown = re.search(r"Could not override '([^']+)'", text)
    unmerged = re.search(r"Key '[^']+' is not in struct\s+full_key: (\S+)", text)
    if unknown is not None:
        full = str(getattr(error.__cause__, "full_key", None))
        key = full if full.startswith(f"{unknown[1]}.") else unknown[1]  # within a value {key: ...}
        return renamed_key(key) or _unknown_key(key, arguments, config)
    if unmerged is not None and (message := renamed_key(unmerged[1])):
        return message
    if "Config search path" in text:
        return text.split("Config search path")[0].strip()
    if isinstance(error, OSError) and error.filename is not None:
        return f"out: cannot write to {error.filename} ({error.strerror}); out=DIR moves it"
    return text


def _special_characters(error: Exception) -> str | None:
    """Return how to type an argument that Hydra cannot read, if that is what is wrong."""
    ambiguous = re.match(r"Ambiguous value for argument '(.*)'\n", str(error))
    word = ambiguous[1] if ambiguous else getattr(error, "override", None)
    if not isinstance(word, str) or "=" not in word:
        return None
    several = "" if ambiguous is None else ", or -m for several runs"
    return (
        f"{word}: a value with characters such as = ( # , or blanks needs quotes: {quoted(word)}"
        f"{several}; lists are [a,b], mappings {{a: 1}}"
    )


def _unknown_key(key: str, arguments: Sequence[str], config: str) -> str:
    parent, _, _ = key.rpartition(".")
    known = _known_keys(parent, arguments, config)
    ways = [f"expected one of {', '.join(known)}"] if known else []
    ways += [f"+{key}=... hands it to timm"] if parent in TO_TIMM else []
    return f"unknown key {key}: {'; '.join(ways)}"


def _known_keys(parent: str, arguments: Sequence[str], config: str) -> list[str]:
    """Return the keys below `parent`, or below its nearest ancestor, in what was asked for."""
    kinds = (*GROUPS, "teacher", "experiment")
    groups = [arg for arg in arguments if arg.partition("=")[0] in kinds and "," not in arg]
    folders = [at_home(arguments[at + 1]) for at, word in enumerate(arguments) if word in _FOLDER]
    if folders:
        groups.append(f"hydra.searchpath=[{','.join(f'file://{path}' for path in folders)}]")
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = hydra.compose(config, overrides=groups)
    except HydraException:  # a choice is wrong as well
        return []
    while parent and OmegaConf.select(cfg, parent) is None:
        parent = parent.rpartition(".")[0]
    return [str(key) for key in (OmegaConf.select(cfg, parent) if parent else cfg)]

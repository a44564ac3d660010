"""The pipeline: score, plan, cut, recover, judge, save."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vitrim.budget.cost import Cost
from vitrim.cli.recipe import _variant
from vitrim.data import bad_images
from vitrim.deploy import quantize
from vitrim.files import PHASES, digest, writable, write
from vitrim.jobs import distributed
from vitrim.measure import latencies
from vitrim.method.dcvit.synthetic import METRIC_SET, sheet
from vitrim.model.transfer import origin
from vitrim.network.surgery import compose, cut
from vitrim.paper import flops_blog
from vitrim.plan import Plan
from vitrim.prune import Prune
from vitrim.report.record import record
from vitrim.store import save
from vitrim.trainer.classify import Classify
from vitrim.trainer.phases import Phases
from vitrim.trainer.tracking import Tracker


def _compress(
    cfg: DictConfig, choices: Mapping[str, Any], recipe: Mapping[str, Any], folder: Path
) -> None:
    """Go from the network to the compact one and its report in `folder`."""
    from vitrim.jobs import distributed
    from vitrim.trainer.classify import Classify

    started = time.perf_counter()
    model, method, data = choices["model"], choices["method"], choices["data"]
    if data is not None and data.chosen and distributed.first():
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
        if METRIC_SET in prune.evidence.moments and distributed.first():
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
    if not distributed.first():
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
        **bad_images.counted(data),
        "seconds": {"total": round(time.perf_counter() - started, 3)},
    }
    _finish(folder, report, phases)


def _dense(
    model: Any, data: Any, phases: Phases | None, recipe: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, float] | None]:
    """Return the dense network, trained here if its weights come from nowhere, and its accuracy."""
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


def _phases(
    cfg: DictConfig, choices: Mapping[str, Any], recipe: Mapping[str, Any], folder: Path
) -> Phases | None:
    from vitrim.trainer.phases import Phases

    if choices["data"] is None:
        return None
    return Phases(
        trainer=choices["trainer"],
        data=choices["data"].module(choices["model"].spec()),
        tracker=Tracker(
            folder,
            cfg.tracking if distributed.first() else "none",
            group=recipe["series"],
            config=recipe["resolved"],
        ),
        folder=folder,
        shared=writable(Path(cfg.out).absolute() / PHASES),
        seed=cfg.seed,
        progress=cfg.progress,
        checkpoint_minutes=cfg.checkpoint.minutes,
    )

"""The pipeline: score, plan, cut, recover, evaluate, save.

    dense --scorer--> evidence --plan--> plan --cut--> compact --recovery--> evaluated, saved

`run` is that line. `vitrim.cli` calls it for a command line, `vitrim.api` for a network at hand.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from lightning import Trainer, seed_everything
from torch import Tensor, nn

from vitrim.budget.cost import Cost, shared_cost
from vitrim.budget.latency import LatencyTable
from vitrim.budget.target import Target
from vitrim.data import Data, bad_images, outputs
from vitrim.deploy import quantize
from vitrim.deploy.pictures import image_grid
from vitrim.deploy.runfolder import DIAGNOSTICS
from vitrim.files import PHASES, digest, writable
from vitrim.jobs import distributed
from vitrim.jobs.status import write_json
from vitrim.measure import LatencySettings, count, latencies, latency_entry
from vitrim.method import Method, Recovers, TrainsWithLabels, scorer_of
from vitrim.model.source import Timm
from vitrim.model.teacher import Teacher
from vitrim.model.weights import describe_weights
from vitrim.network.head_runs import Arrangement, arranged
from vitrim.network.skeleton import outline
from vitrim.network.surgery import combine, cut
from vitrim.plan import Evidence, Plan, Proposal
from vitrim.prune import Slicing
from vitrim.report.record import Accuracy, record
from vitrim.store import save
from vitrim.trainer.classify import Classify
from vitrim.trainer.control import control_entry
from vitrim.trainer.distillation import Distillation
from vitrim.trainer.phase import Phase, check_scorer, stage_name
from vitrim.trainer.phases import LAST, PhaseRunner
from vitrim.trainer.recipe import Recipe
from vitrim.trainer.sharing import shared_weights
from vitrim.trainer.tracking import Tracker, Wandb

IDENTITY = Plan(model={}, edits=())


class Start(NamedTuple):
    """The network that is compressed, and the plan that leads to it from the dense one."""

    net: nn.Module
    plan: Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a run compresses, by which method, to which target, on which images.

    Args:
        model: the dense network and where its weights come from.
        method: what scores, plans and recovers.
        target: what may remain.
        data: labelled images; None: structure only, whatever needs images is skipped.
        trainer: makes the Trainer of each phase.
        out: root of the run folders.
        start: the compact network of an earlier run; None: the dense network.
        latency: how latency is measured.
        latency_table: gives the table that predicts latency; None where the target is no time.
        quantize: int8 schemes in which the compact network is evaluated, timed and saved as well.
        seed: of everything that is random.
        tracking: offline, online, tensorboard, csv, mlflow or none.
        progress: whether progress bars are shown.
        checkpoint_minutes: between two checkpoints within a phase; None: no state is kept.
        batchnorm_images: that estimate the statistics of folded BatchNorms before training.
        evaluates: whether the networks are evaluated on labelled images.
        wandb: where W&B keeps the run.
        control: whether the dense network is trained for as long as the compact one, to compare.
        teacher: from which the fine-tuning learns as well as from the labels; None: none.
        heads: how those of the compact network are run while it is trained.
        compiles: whether training steps are compiled (`vitrim.trainer.compilation`).
    """

    model: Timm
    method: Method
    target: Target
    data: Data | None
    trainer: Callable[..., Trainer]
    out: Path
    start: Start | None
    latency: LatencySettings
    latency_table: Callable[[], LatencyTable] | None
    quantize: Sequence[str]
    seed: int
    tracking: str
    progress: bool
    checkpoint_minutes: float | None
    batchnorm_images: int
    evaluates: bool = True
    wandb: Wandb = field(default_factory=Wandb)
    control: bool = False
    teacher: Teacher | None = None
    heads: Arrangement = "runs"
    compiles: bool = False

    @property
    def retrains(self) -> bool:
        """Whether nothing is removed and the network is trained all the same (transfer)."""
        return self.method.granularity == "none"

    @property
    def labelled_training(self) -> Sequence[Recipe]:
        """The trainings of the method on labelled images; the last is the fine-tuning."""
        return self.method.labelled_training if isinstance(self.method, TrainsWithLabels) else ()

    @property
    def control_recipes(self) -> Sequence[Recipe]:
        """The trainings of the control; none where none is asked for, or the method has none."""
        return self.labelled_training if self.control else ()

    def distillation(self) -> Distillation | None:
        """Return the teacher with its weights; None where there is none to learn from."""
        return self.teacher.build(self.model.spec()) if self.teacher and self.data else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What tells a run from others.

    Args:
        method: name of the method, for plans and tables.
        strength: that was asked for; None where a target was.
        recipe: the resolved configuration, for the record.
        digest: of all that decides the result.
        dense_key: digest of what decides the dense network and its accuracy.
        start_key: the same of the network that is scored.
        series: name of the folder that runs share which differ in budget and seed only.
        name: of the run's own folder in it.
        facts: what the report says of the run.
    """

    method: str
    strength: float | None
    recipe: Mapping[str, object]
    digest: str
    dense_key: str
    start_key: str
    series: str
    name: str
    facts: Mapping[str, object] = field(default_factory=dict)


class CutNetwork(NamedTuple):
    """A compact network right after the cut, its plan, and the phases that are to follow."""

    net: nn.Module
    plan: Plan
    proposal: Proposal
    recovery: Iterable[Phase] = ()


def run(job: Job, identity: Identity, folder: Path) -> dict[str, object]:
    """Compress the network of `job` into `folder` and return the report.

    The folder gets plan.json, model.safetensors, manifest.json and report.json. Phases that were
    finished before are taken from disk; one that was stopped resumes. Of several processes only
    the first writes, and the others return an empty report.
    """
    started = time.perf_counter()
    runner = _runner(job, identity, folder)
    distillation = job.distillation()
    seed_everything(job.seed, verbose=False)  # for weights that are drawn
    dense, dense_accuracy = _dense(job, identity, runner)
    cost = _cost(job, dense)
    compressed = _compressed(job, identity, runner, dense, cost, folder)
    stages = _stages(job, runner, compressed, dense_accuracy, folder, distillation)
    compressed = _with_int8_layers(job, runner, compressed, stages, folder)
    plan = _final_plan(job, identity, compressed.plan)
    int8 = _quantized(job, runner, compressed.net, plan)
    control = control_entry(runner, dense, job.control_recipes, identity.start_key, distillation)
    if not distributed.is_main_process():
        return {}
    _save(compressed, plan, int8, folder)
    nets = (dense, compressed.net, *(quantized.net for quantized in int8.values()))
    times = latencies(nets, cost.input_size, **asdict(job.latency))
    compact_count = count(compressed.net, cost.input_size)
    report = {
        **record(cost, compact_count, plan, times[:2], dense_accuracy, stages, job.target),
        **_predicted(job, cost, plan),
        **quantize.report_entries(compressed.net, int8, [time.median for time in times[2:]]),
        **control,
        **identity.facts,
        "weights": _weights(job, dense),
        "latency": latency_entry(job.latency, compressed.net, times[1].heads),
        **outputs.report_entry(job.data),
        **bad_images.report_entry(job.data),
        "seconds": {"total": round(time.perf_counter() - started, 3)},
    }
    _finish(folder, report, runner)
    return report


def _runner(job: Job, identity: Identity, folder: Path) -> PhaseRunner | None:
    """Return what runs the phases; None where there are no images."""
    if job.data is None:
        return None
    if job.data.sample_names and distributed.is_main_process():
        names = "\n".join([*job.data.sample_names, ""])
        (folder / "samples.txt").write_text(names, encoding="utf-8", errors="surrogateescape")
    tracking = job.tracking if distributed.is_main_process() else "none"
    return PhaseRunner(
        trainer=job.trainer,
        data=job.data.module(job.model.spec()),
        tracker=Tracker(
            folder, tracking, group=identity.series, config=identity.recipe, wandb=job.wandb
        ),
        folder=folder,
        shared=writable(job.out / PHASES),
        seed=job.seed,
        progress=job.progress,
        checkpoint_minutes=job.checkpoint_minutes,
        batchnorm_images=job.batchnorm_images,
        evaluates=job.evaluates,
        compiles=job.compiles,
    )


def _dense(job: Job, identity: Identity, runner: PhaseRunner | None) -> tuple[nn.Module, Accuracy]:
    """Return the dense network, trained here if its weights come from nowhere, and its accuracy."""
    if runner is None or job.data is None or (job.retrains and not job.model.has_weights):
        return job.model.build(fetch=False), None  # weights that nobody looks at
    net = job.model.build()
    folder = runner.shared / f"dense-{identity.dense_key}"
    if not job.model.trained:
        phase = Classify(net, recipe=job.model.training, n_classes=job.data.n_classes)
        runner.run_or_load(folder, phase, name="dense")
    return net.eval(), runner.evaluate(folder, net, job.data.n_classes)


def _cost(job: Job, dense: nn.Module) -> Cost:
    """Return the formula of the dense network: its skeleton's, which checks may have counted."""
    skeleton = job.model.shared_skeleton()
    if outline(dense) != outline(skeleton):  # the tag of its weights changes the network
        return Cost(dense, job.model.spec().size, latency_table=job.latency_table)
    return shared_cost(skeleton, job.model.spec().size, job.latency_table)


def _compressed(
    job: Job,
    identity: Identity,
    runner: PhaseRunner | None,
    dense: nn.Module,
    cost: Cost,
    folder: Path,
) -> CutNetwork:
    """Score, plan and cut; where everything may remain, copy the network to start from."""
    start = job.start or Start(dense, IDENTITY)
    if job.target.is_identity:
        net = cut(start.net, IDENTITY)
        recovery = _recovery(job, runner, net, dense, Evidence()) if job.retrains else ()
        return CutNetwork(net, start.plan, Proposal(edits=()), recovery)
    own_cost = cost if job.start is None else Cost(start.net, cost.input_size, cost)
    prune = Slicing(job.method, own_cost, job.target, name=identity.method)
    _score(job, start.net, prune, runner, identity)
    plan = replace(prune.plan, provenance={"strength": identity.strength, **prune.proposal.notes})
    plan = plan if job.start is None else combine(dense, start.plan, plan)
    if prune.evidence.synthetic is not None and distributed.is_main_process():
        image_grid(prune.evidence.synthetic, job.model.spec(), folder / "synthetic.png")
    edited = bool(prune.plan.edits)
    recovery = _recovery(job, runner, prune.compact, dense, prune.evidence) if edited else ()
    return CutNetwork(prune.compact, plan, prune.proposal, recovery)


def _score(
    job: Job, net: nn.Module, prune: Slicing, runner: PhaseRunner | None, identity: Identity
) -> None:
    """Train the scorer, once for all strengths; the callback plans and cuts."""
    scorer = check_scorer(scorer_of(job.method, copy.deepcopy(net), prune.cost, job.target))
    with shared_weights(scorer, net):
        if runner is None:
            prune.apply(scorer)
            return
        key = digest([identity.start_key, type(scorer).__qualname__, scorer.settings])
        runner.run_or_load(runner.shared / f"score-{key}", scorer, name="score", callbacks=[prune])


def _recovery(
    job: Job, runner: PhaseRunner | None, student: nn.Module, teacher: nn.Module, evidence: Evidence
) -> Iterable[Phase]:
    """Return the phases that the method has for the compact network, if there are images."""
    if runner is None or job.data is None or not isinstance(job.method, Recovers):
        return ()
    return job.method.recovery(student, teacher, evidence, job.data.n_classes)


def _stages(
    job: Job,
    runner: PhaseRunner | None,
    compressed: CutNetwork,
    dense_accuracy: Accuracy,
    folder: Path,
    distillation: Distillation | None,
) -> dict[str, Accuracy]:
    """Run the recovery; return the accuracy after the cut and after each phase, by its name."""
    stages: dict[str, Accuracy] = {"cut": dense_accuracy}
    if runner is None or job.data is None or not (compressed.plan.edits or job.retrains):
        return stages
    net, n_classes = compressed.net, job.data.n_classes
    stages["cut"] = runner.evaluate(folder / PHASES / "cut", net, n_classes)
    with arranged(net, job.heads):
        for phase in compressed.recovery:
            name = stage_name(phase, stages)
            if isinstance(phase, Classify):
                phase.learn_from(distillation)
            runner.run_or_load(folder / PHASES / name, phase, name=name)
            stages[name] = runner.evaluate(folder / PHASES / name, net, n_classes)
    return stages


def _with_int8_layers(
    job: Job,
    runner: PhaseRunner | None,
    compressed: CutNetwork,
    stages: dict[str, Accuracy],
    folder: Path,
) -> CutNetwork:
    """Return the network with the int8 layers of its plan, once it is trained; a stage of its own.

    A network to start from has none.
    """
    edits = tuple(compressed.plan.int8s())
    if not edits:
        return compressed
    net = cut(compressed.net, Plan(model={}, edits=edits))
    if runner is not None and job.data is not None:
        stages["int8"] = runner.evaluate(folder / PHASES / "int8", net, job.data.n_classes)
    return compressed._replace(net=net)


def _quantized(
    job: Job, runner: PhaseRunner | None, net: nn.Module, plan: Plan
) -> dict[str, quantize.Quantized]:
    """Return the compact network in every int8 scheme, evaluated."""
    networks = {}
    for scheme in job.quantize:
        images: Iterable[Tensor] = ()
        if scheme == quantize.SMOOTH and runner is not None:
            images = runner.calibration_images(quantize.SMOOTH_IMAGES)
        int8, its_plan = quantize.in_int8(net, plan, scheme, images)
        accuracy = None
        if runner is not None and job.data is not None:
            accuracy = runner.accuracy(int8, job.data.n_classes)
        networks[scheme] = quantize.Quantized(int8, its_plan, accuracy)
    return networks


def _final_plan(job: Job, identity: Identity, plan: Plan) -> Plan:
    """Return the plan with its network, seed and recipe."""
    of_run = {"seed": job.seed, "recipe_hash": identity.digest}
    return replace(plan, model=job.model.description(), provenance={**plan.provenance, **of_run})


def _save(
    compressed: CutNetwork, plan: Plan, int8: Mapping[str, quantize.Quantized], folder: Path
) -> None:
    """Save the compact network with its plan and diagnostics, and each int8 network in a folder."""
    save(folder, compressed.net, plan)
    for scheme, quantized in int8.items():
        save(folder / scheme, quantized.net, quantized.plan)
    if compressed.proposal.diagnostics:
        write_json(folder / DIAGNOSTICS, compressed.proposal.diagnostics)


def _predicted(job: Job, cost: Cost, plan: Plan) -> dict[str, object]:
    """Return the latency that the table predicts, where the target is a latency."""
    if job.latency_table is None:
        return {}
    return {"predicted_latency": job.latency_table().predicted(cost.structure, plan)}


def _weights(job: Job, dense: nn.Module) -> dict[str, object]:
    """Return where the dense weights came from; without images, nothing was downloaded."""
    unused = job.data is None or (job.retrains and not job.model.has_weights)
    return describe_weights(job.model, dense, downloaded=not unused)


def _finish(folder: Path, report: Mapping[str, object], runner: PhaseRunner | None) -> None:
    """Write the report and remove the run's own checkpoints; last weights beside the best stay."""
    if runner is not None:
        runner.tracker.close(report)
    for state in (folder / PHASES).glob(f"*/{LAST}"):
        state.replace(folder / f"{state.parent.name}-{LAST}")
    write_json(folder / "report.json", report)
    shutil.rmtree(folder / PHASES, ignore_errors=True)

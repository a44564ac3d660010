"""Shows that a rebuilding changes no number: `python -m tests.golden record`, then `compare`.

    record FOLDER           runs every case by the command line, each in a process of its own, and
                            keeps what the run leaves: plan, report, the SHA-256 of the weights
    compare BEFORE AFTER    prints every difference between two such folders and exits with 1, or
                            with 0 if there is none

`record --source SRC --entry MODULE` runs another version, with SRC first on the path. Times,
versions and names of folders may differ; everything else must be equal. Between versions, keys get
other names: the two tables below say which. The cases with real weights need ../shared/data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any

RENAMED_ARGUMENTS: dict[str, str] = {
    "method.tuning.logits_weight": "method.tuning.logits",
    "method.qkv=separate": "method.qkv=split",
    "method.unit_selection": "method.reuse",
    "method.judging_set=synthetic": "method.metric_set=dream",
    "method.synthetic": "method.dream",
    "method.group_size": "method.together",
    "method.protected": "method.spare",
    "method.gradient_images": "method.loss_images",
    "method.recoverability=least_squares": "method.adaptors=true",
    "method.pooled_weight": "method.pooled",
    "method.reconstruct": "method.regression",
}
"""New key of the command line, or key=value: the old one. What stands below it moves along."""
RENAMED_KEYS: dict[str, str | None] = {
    "foretold": "predicted_latency",
    "format": None,
}
"""Old key in the JSON files, or several parted by /: the new one; None: it is not compared."""
RENAMED_VALUES = {("criterion", "surgeon"): "obs_greedy"}
"""Key and old value in the JSON files: the new value."""
OLD_ENTRY = "vitrim.run"
"""The version that is run by this module has the old keys on its command line."""
IGNORED = re.compile("latency_.*|blocks_ms|seconds|versions|vitrim|commit|dirty|recipe_hash|series")
"""Keys that may differ at any level."""

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
TAR, WEIGHTS = DATA / "imagenet_mini.tar", DATA / "vit_tiny_patch16_224.safetensors"
KEPT = ("plan.json", "report.json", "diagnostics.json")

COMMON = ("tracking=none", "progress=false", "latency.repeats=1")
DENSE = ("model.training.epochs=10",)
"""One training of the dense network, for all cases on the digits."""
METHODS: dict[str, tuple[str, ...]] = {
    "aiminify": ("method.tuning.training.epochs=1",),
    "cd": ("method.fine_tuning.epochs=1",),
    "dcvit": ("method.tuning.training.epochs=1",),
    "fskd": (),
    "joint": ("method.local.epochs=1", "method.scaling.images=16"),
    "mir": ("method.protected=[0,0]", "method.tuning.epochs=1"),
    "mixed_rank": ("method.tuning.training.epochs=1", "method.residual.training.epochs=1"),
    "oneshot": ("method.tuning.training.epochs=1",),
    "practise": (
        *("method.recoverability=least_squares", "method.protected=[0,0]"),
        *("method.pooled_weight=0.0", "method.tuning.epochs=1"),
    ),
    "vtp": (
        "method.gating.epochs=1",
        "method.gating.lr=1e-3",
        "method.gate_lr=1e-2",
        "method.fine_tuning.epochs=1",
    ),
}
"""Every method, and what makes it short."""
SWIN = (
    "model=swin_tiny",
    "model.num_classes=10",
    "model.image_size=8",
    "+model.args.in_chans=1",
    "+model.args.patch_size=1",
    "+model.args.window_size=3",
    "+model.args.embed_dim=12",
    "+model.args.depths=[2,4]",
    "+model.args.num_heads=[2,3]",
    "model.training.epochs=6",
    "model.training.lr=1e-2",
    "model.training.warmup_epochs=1",
)
CNN = (
    "model=resnet34",
    "model.name=resnet18",
    "model.num_classes=10",
    "model.image_size=8",
    "+model.args.layers=[1,2,2,1]",
    "+model.args.channels=[8,8,8,8]",
    "+model.args.in_chans=1",
    "model.mean=[0.5]",
    "model.std=[0.5]",
    "model.training.epochs=6",
    "model.training.lr=1e-2",
    "model.training.warmup_epochs=1",
)
SPECIAL: dict[str, tuple[str, ...]] = {
    "dense": (*DENSE, "method=oneshot", "strength=0"),
    "macs": (*DENSE, "method=oneshot", "target.macs=0.7"),
    "quantize": (*DENSE, "method=oneshot", "quantize=[int8_weight_only]"),
    "sweep": ("-m", *DENSE, "method=oneshot", "strength=1,2"),
    "oneshot-sites": (*DENSE, "method=oneshot", "method.sites=[mlp,heads,qk,v]"),
    "oneshot-loss": (
        *(*DENSE, "method=oneshot", "method.scope=loss", "method.sites=[mlp,qk]"),
        "method.losses.scaling.images=16",
    ),
    "mixed_rank-kl": (
        *(*DENSE, "method=mixed_rank", *METHODS["mixed_rank"]),
        *("method.allocation=kl", "method.losses.images=16"),
    ),
    "oneshot-tuned": (
        *DENSE,
        *("method=oneshot", *METHODS["oneshot"], "method.scope=global"),
        *("method.criterion=taylor", "method.compensation=ridge", "method.fine_tune=true"),
        *("method.tuning.objective=mimic", "method.tuning.logits_weight=1.0"),
    ),
    "vtp-site": (
        *(*DENSE, "method=vtp", *METHODS["vtp"]),
        *("method.scope=site", "method.even_heads=true"),
    ),
    "mixed_rank-paper": (
        *(*DENSE, "method=mixed_rank", *METHODS["mixed_rank"]),
        *("method.decomposition=normalised_output", "method.allocation=energy"),
        *("method.residual.rank=1", "method.regression=false"),
        *("method.tuning.trained=uncompressed", "method.curves=true", "method.qkv=separate"),
    ),
    "dcvit-trials": (
        *(*DENSE, "method=dcvit", *METHODS["dcvit"], "strength=4"),
        *("method.trial.training.epochs=1", "method.unit_selection=random"),
    ),
    "dcvit-dream": (
        *(*DENSE, "method=dcvit", *METHODS["dcvit"], "method.judging_set=synthetic"),
        *("method.synthetic.iterations=2", "method.synthetic.images=4"),
    ),
    "dcvit-paper": (
        *(*DENSE, "method=dcvit", *METHODS["dcvit"], "target.blocks=1"),
        *("method.accounting=paper", "method.reconstruct=false", "method.distance=mse"),
        *(
            "method.unit_selection=activation",
            "method.tuning.mimic=class",
            "method.progressive=false",
        ),
    ),
    "swin-oneshot": (*SWIN, "method=oneshot"),
    "swin-dcvit": (
        *(*SWIN, "method=dcvit", *METHODS["dcvit"], "target.blocks=2.5"),
        *("method.group_size=2", "method.protected=[2,0]", "method.accounting=paper"),
        *("method.trial.training.epochs=1", "method.trial.width=0.9"),
    ),
    "cnn-fskd": (*CNN, "method=fskd"),
    "cnn-cd": (*CNN, "method=cd", *METHODS["cd"]),
    "cnn-vtp": (*CNN, "method=vtp", *METHODS["vtp"]),
    "cnn-dcvit": (
        *(*CNN, "method=dcvit", *METHODS["dcvit"]),
        *("method.protected=[0,0]", "target.blocks=1"),
    ),
}
"""Cases by themselves, at strength 3 if not said."""
FOLLOWING: dict[str, tuple[str, tuple[str, ...]]] = {
    "from_run": ("digits-oneshot-2", (*DENSE, "method=mixed_rank", "target.params=0.6")),
    "transfer": (
        "digits-oneshot-2",
        ("experiment=transfer", "strength=0", "model.training.epochs=1"),
    ),
    "from_transfer": (
        "transfer",
        (*DENSE, "method=mixed_rank", "target.params=0.6"),
    ),
}
"""Cases that begin with the run of another one."""
FEW = ("method.sampling.images=150", "trainer.limit_val_batches=2")
REAL: dict[str, tuple[str, ...]] = {
    "real-oneshot": ("experiment=oneshot/vit_tiny", "strength=3", *FEW),
    "real-mixed_rank": (
        *("experiment=mixed_rank/vit_tiny", "target.params=4649742", *FEW),
        "method.gradient_images=64",
    ),
}
"""Cases with the weights of ViT-Ti and images of ImageNet: few, judged on 100."""

_RUNNER = """
import json
import os
import runpy
import sys
from importlib.util import find_spec
import lightning  # with torch: takes most of a run's start, and none of them changes it
found = find_spec("vitrim")
print(found and found.origin, flush=True)
for line in sys.stdin:
    entry, log, *words = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in enumerate((os.devnull, log + ".out", log + ".err")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        sys.argv = [entry, *words]
        runpy.run_module(entry, run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command line; it may begin with the run of the case `after`."""

    words: tuple[str, ...]
    after: str | None = None


class Failed(Exception):
    """A run that did not come to its end."""


@dataclass(kw_only=True)
class Runner:
    """Does what `python -m entry words ...` does, without importing torch each time.

    A process that has imported the libraries, and not vitrim, forks into every run.
    """

    source: Path
    entry: str
    work: Path
    _runs: int = field(default=0, init=False)

    def __enter__(self) -> Runner:
        env = {name: text for name, text in os.environ.items() if name != "TIMM_FUSED_ATTN"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.work,
            env={**env, "PYTHONPATH": str(self.source), "OMP_NUM_THREADS": "1"},
        )
        found = self._answer()
        if not Path(found).is_relative_to(self.source):
            sys.exit(f"--source={self.source}: vitrim is found in {found}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __call__(self, words: Sequence[str]) -> list[Path]:
        """Return the folders of the runs that the command says it made."""
        assert self._process.stdin is not None
        self._runs += 1
        log = self.work / f"run-{self._runs}"
        if self.entry == OLD_ENTRY:
            words = [_renamed(word, RENAMED_ARGUMENTS) for word in words]
        self._process.stdin.write(json.dumps([self.entry, str(log), *words]) + "\n")
        self._process.stdin.flush()
        code = self._answer()
        printed = log.with_suffix(".out").read_text().splitlines()
        found = dict.fromkeys(line for line in printed if line.endswith("/report.json"))
        if code != "0" or not found:
            said = log.with_suffix(".err").read_text().strip()
            raise Failed(f"exit code {code}: {said[-2000:]}")
        return [Path(line).parent for line in found]


def cases() -> dict[str, Case]:
    """Return every case by its name, those that others begin with first."""
    found = {}
    for method, short in METHODS.items():
        for strength in (2, 4):
            words = (*DENSE, f"method={method}", f"strength={strength}", *short)
            found[f"digits-{method}-{strength}"] = Case(words=words)
        words = ("model=vit_base", "data=none", f"method={method}", "strength=3")
        found[f"structure-{method}"] = Case(words=words)
    found |= {name: Case(words=words) for name, words in SPECIAL.items()}
    for name, (after, words) in FOLLOWING.items():
        found[name] = Case(words=words, after=after)
    return found | {name: Case(words=words) for name, words in REAL.items()}


def record(folder: Path, source: Path, entry: str, only: Sequence[str]) -> int:
    """Run the cases that fit `only`, keep their results in `folder`, return how many failed."""
    methods = {path.stem for path in (source.parent / "conf" / "method").glob("*.yaml")}
    for method in sorted(methods - {*METHODS}):
        _say(f"method={method}: there is no case of it")
    started, failed = time.monotonic(), 0
    runs: dict[str, list[Path]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch).resolve()
        real = _real_words(work)
        with Runner(source=source, entry=entry, work=work) as run:
            for name, case in _chosen(only).items():
                if name in REAL and not real:
                    _say(f"{name}: skipped, there is no {DATA}")
                    continue
                begun = time.monotonic()
                shutil.rmtree(folder / name, ignore_errors=True)
                words = [*COMMON, f"out={work / 'outputs'}", *(real if name in REAL else ())]
                try:
                    if case.after is not None:
                        words.append(f"from_run={runs[case.after][0]}")
                    runs[name] = run([*case.words, *words])
                    _keep(runs[name], folder / name)
                    _say(f"{name}: {time.monotonic() - begun:.0f} s")
                except (Failed, KeyError) as error:
                    _say(f"{name}: FAILED, {error}")
                    failed += 1
    _say(f"{len(runs)} recorded, {failed} failed, {time.monotonic() - started:.0f} s")
    return failed


def _chosen(only: Sequence[str]) -> dict[str, Case]:
    """Return the cases whose names fit one of the patterns, and what they begin with."""
    known = cases()
    wanted = {name for name in known if any(fnmatch(name, pattern) for pattern in only)}
    for name in reversed(known):
        if name in wanted and (after := known[name].after) is not None:
            wanted.add(after)
    return {name: case for name, case in known.items() if name in wanted}


def _real_words(work: Path) -> list[str]:
    """Return where the real weights and images are, unpacked in `work`; nothing without them."""
    if not (TAR.is_file() and WEIGHTS.is_file()):
        return []
    with tarfile.open(TAR) as archive:
        archive.extractall(work / "images", filter="data")
    return [f"data.root={work / 'images'}", "data.workers=0", f"model.checkpoint={WEIGHTS}"]


def _keep(runs: Sequence[Path], folder: Path) -> None:
    """Copy what is compared of each run, and write the SHA-256 of its weights."""
    for number, run in enumerate(runs):
        place = folder / str(number) if len(runs) > 1 else folder
        place.mkdir(parents=True)
        for name in KEPT:
            if (run / name).is_file():
                shutil.copy(run / name, place)
        with (run / "model.safetensors").open("rb") as file:
            found = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        (place / "weights.json").write_text(json.dumps(found))


def compare(before: Path, after: Path, only: Sequence[str]) -> int:
    """Print how the runs in two folders differ, and return how many do."""
    sides = [(folder, _runs_in(folder, only)) for folder in (before, after)]
    said = {}
    for name in sorted({run for _, side in sides for run in side}):
        absent = [str(folder) for folder, side in sides if name not in side]
        if absent:
            said[name] = f"not in {absent[0]}"
            continue
        old, new = (facts(side[name]) for _, side in sides)
        keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        for key in keys:
            _say(f"{name}: {key}: {_apart(old.get(key, 'nothing'), new.get(key, 'nothing'))}")
        said[name] = f"{len(keys)} differences" if keys else "equal"
    for name, words in said.items():
        _say(f"{name}: {words}")
    different = sum(words != "equal" for words in said.values())
    _say(f"{len(said) - different} equal, {different} different")
    return different if said else 1


def _runs_in(root: Path, only: Sequence[str]) -> dict[str, Path]:
    """Return the folder of every run recorded below `root` whose case fits, by name."""
    found = {path.parent.relative_to(root): path.parent for path in root.rglob("report.json")}
    return {
        str(name): path
        for name, path in sorted(found.items())
        if any(fnmatch(name.parts[0], pattern) for pattern in only)
    }


def facts(run: Path) -> dict[str, str]:
    """Return everything that is compared of a run: JSON text by path.

    What is known of a plan is one mapping, wherever it stands: in the plan, in its provenance or in
    the diagnostics beside it.
    """
    read = {path.stem: json.loads(path.read_text()) for path in run.glob("*.json")}
    plan = read.pop("plan")
    made = {name: plan.pop(name) for name in ("model", "edits")}
    about = {**plan.pop("provenance", {}), **plan, **read.pop("diagnostics", {})}
    about = _present(about, chosen=read["report"]["strength"] is None)
    if "steps" in about:  # they name the methods
        about.pop("method", None)
        last = len(about["steps"]) - 1
        about["steps"] = [
            _present(step, chosen=place == last and read["report"]["strength"] is None)
            for place, step in enumerate(about["steps"])
        ]
    words = [_renamed(word, _new_names()) for word in read["report"].get("variant", "").split()]
    read["report"]["variant"] = " ".join(sorted(words))
    return dict(_leaves({**read, "plan": made, "about": about}, ""))


def _present(about: dict[str, Any], *, chosen: bool) -> dict[str, Any]:
    """Return what is known of a plan with its present values, without what is empty.

    Of a run with a target that was `chosen`, 0.1.0 noted the default strength.
    """
    about = {key: RENAMED_VALUES.get((key, str(value)), value) for key, value in about.items()}
    if chosen:
        about.pop("strength", None)
    return {key: value for key, value in about.items() if value not in ({}, "")}


def _leaves(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Iterate over the paths and JSON texts of numbers, words and lists of them."""
    parts: Mapping[Any, Any] = {}
    if isinstance(value, dict):
        parts = value
    elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
        parts = dict(enumerate(value))
    for key, part in parts.items():
        if not IGNORED.fullmatch(str(key)):
            yield from _leaves(part, f"{where}/{key}")
    if parts:
        return
    for old, new in RENAMED_KEYS.items():
        if f"/{old}/" in f"{where}/":
            if new is None:
                return
            where = f"{where}/".replace(f"/{old}/", f"/{new}/").removesuffix("/")
    yield where.removeprefix("/"), json.dumps(value)


def _renamed(word: str, names: Mapping[str, str]) -> str:
    """Return an argument of the command line with its key as `names` has it."""
    for name, other in names.items():
        fits = re.match(rf"([+~]*){re.escape(name)}(?=[.=]|$)", word)
        if fits:
            return f"{fits[1]}{other}{word[fits.end() :]}"
    return word


def _new_names() -> dict[str, str]:
    """Return the new key of every old one, as reports have them: below the method."""
    pairs = {old: new for new, old in RENAMED_ARGUMENTS.items()}
    return {old.removeprefix("method."): new.removeprefix("method.") for old, new in pairs.items()}


def _apart(one: str, other: str) -> str:
    """Return two texts from shortly before the first place where they differ."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    start = max(0, sum(1 for _ in same) - 20)
    return " -> ".join(
        f"{'...' * (start > 0)}{text[start : start + 80]}{'...' * (len(text) > start + 80)}"
        for text in (one, other)
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Record or compare, as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--source", type=Path, default=ROOT / "src", help="the folder of vitrim")
    recording.add_argument("--entry", default="vitrim", help="the module to run (vitrim)")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    for command in (recording, comparing):
        command.add_argument("--only", nargs="+", default=["*"], help="names or patterns of cases")
    args = parser.parse_args()
    if args.command == "record":
        wrong = record(args.folder, args.source.resolve(), args.entry, args.only)
    else:
        wrong = compare(args.before, args.after, args.only)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

"""What vitrim makes of every network of timm: `python -m tests.matrix [name ...]`.

Each is built on the meta device and described; half of its units are cut. A row says how many sites
and branches it has, `refused` and the sentence, or `FAILED` and what went wrong: the network, its
count or its cut ends in any other way. About 20 minutes for all names on one core.

With `--small`, one small network of every family is built with random weights, cut to half of its
MACs (or to what is the least that its sites can give up) by weight norms, and taken through what a
user would do with it. A row says, for each column, `ok`, what went wrong, or `-` where it was not
tried.
    masked      in float64, the cut network computes what the masked one does, to 1e-12
    backward    one step in training mode gives every parameter a gradient that the dense one's has
    counts      the counter, the closed formula and the parameters themselves agree
    load        another process, which never saw the dense network, loads it bit-equal
    onnx        exported, it computes the same in onnxruntime, to 1e-4 of the largest logit;
                `dense too` where torch cannot export the dense network either

Exits with 1 if anything went wrong.
"""

from __future__ import annotations

import argparse
import copy
import logging
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitrim import Drop, Keep, Plan, count, cut, masked, save
from vitrim.budget.cost import Cost
from vitrim.budget.target import Target, TargetError
from vitrim.budget.trim import trim
from vitrim.closed_form.importance import importance
from vitrim.measure import InputSizeError, image_shape
from vitrim.network import UnsupportedArchitecture, sites, structure
from vitrim.network.skeleton import dense_skeleton
from vitrim.network.structure import Structure, blocks_of
from vitrim.store import ARCHITECTURE

SMALL = {"depth": 3}
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "deit3_small_patch16_224": SMALL,
    "vit_small_patch14_reg4_dinov2": {**SMALL, "img_size": 112},
    "vit_base_patch32_clip_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "flexivit_small": SMALL,
    "swin_tiny_patch4_window7_224": {"depths": [2, 2, 2, 2]},
    "swinv2_tiny_window8_256": {"depths": [2, 2, 2, 2]},
    "beit_base_patch16_224": SMALL,
    "beitv2_base_patch16_224": SMALL,
    "eva02_tiny_patch14_224": SMALL,
    "eva02_base_patch14_224": SMALL,
    "eva_giant_patch14_clip_224": {**SMALL, "embed_dim": 352, "num_heads": 4},
    "vit_small_patch16_dinov3": SMALL,
    "vit_small_patch16_rope_224": SMALL,
    "vit_small_patch16_rope_mixed_224": SMALL,
    "cait_xxs24_224": SMALL,
    "xcit_nano_12_p16_224": SMALL,
    "pvt_v2_b0": {},
    "convit_tiny": {"depth": 11},  # the last two attend as others do
    "levit_128s": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "pit_ti_224": {},
    "twins_svt_small": {"depths": [1, 1, 2, 1]},
    "twins_pcpvt_small": {"depths": [1, 1, 2, 1]},
    "volo_d1_224": {},
    "mixer_s32_224": {},
    "resmlp_12_224": {},
    "gmlp_ti16_224": {},
    "crossvit_tiny_240": {},
    "tnt_s_patch16_224": SMALL,
    "nest_tiny": {},
    "gcvit_xxtiny": {},
    "davit_tiny": {"depths": [1, 1, 2, 1]},
    "hiera_tiny_224": {},
    "mvitv2_tiny": {},
    "focalnet_tiny_srf": {},
    "samvit_base_patch16_224": SMALL,
    "edgenext_xx_small": {},
    "maxvit_rmlp_pico_rw_256": {},
    "resnet18": {},
    "resnet50": {"layers": [1, 1, 1, 1]},
    "mobilenetv2_050": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
}
"""timm's names, and the arguments that make them small."""

ABOUT = ("class", "macs", "params")
COLUMNS = ("masked", "backward", "counts", "load", "onnx")
SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Of the MACs: the first that can be reached is the budget."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What vitrim makes of one name: `kind` is supported, refused or FAILED."""

    kind: str
    words: str
    n_sites: int = 0
    n_branches: int = 0


def outcome_of(
    name: str, args: Mapping[str, Any] | None = None, *, shapes: bool = False
) -> Outcome:
    """Return what vitrim makes of a name: its network is cut and counted, or refused.

    `args` are arguments of the network. With `shapes` the shapes of the logits are compared as
    well.
    """
    try:
        net = dense_skeleton({"name": name, "args": {**(args or {})}}).eval()
        described = structure(net)
        config = timm.get_pretrained_cfg(name)
        size = (3, 224, 224) if config is None else config.input_size
        side = (args or {}).get("img_size")
        size = (3, side, side) if side else size
        plan = halved(described)
        cost, compact = Cost(net, size), cut(net, plan)
        expected, counted = cost.plan(plan), count(compact, size)
        _expect(expected[:2] == counted[:2], f"counted {counted[:2]}, formula {expected[:2]}")
        if shapes:
            image = torch.empty(2, *image_shape(net, size), device="meta")
            with torch.no_grad():
                _expect(compact.eval()(image).shape == net(image).shape, "logits of other shapes")
        n_sites = sum(not site.locked_reason for site in described.sites.values())
        _expect(n_sites > 0, "there are no sites to cut")
    except UnsupportedArchitecture as error:
        sound = "supported" in str(error) and not isinstance(error, InputSizeError)
        kind = "refused" if sound else "FAILED"
        return Outcome(kind=kind, words=str(error).partition("\n")[0])
    except Exception as error:
        return Outcome(kind="FAILED", words=_words(error))
    n_branches = len(described.branches)
    words = f"{n_sites} sites, {n_branches} branches"
    return Outcome(kind="supported", words=words, n_sites=n_sites, n_branches=n_branches)


def halved(described: Structure) -> Plan:
    """Return a plan that halves every site except in the last block, which it drops."""
    last = [*blocks_of(described).values()][-1] if described.branches else []
    inside = {
        part.site
        for layer in described.layers
        if layer.branch in last
        for part in (*layer.out, *layer.inp)
    }
    heads = {attention.heads for attention in described.attentions}
    keeps = [
        Keep(site=site.name, index=tuple(range(0, site.size, 2)))
        for site in described.sites.values()
        if site.size > 1 and not site.locked_reason and site.name not in inside | heads
    ]
    return Plan(model={}, edits=(*(Drop(branch=name) for name in last), *keeps))


_LOADER = """
import sys
import torch
import vitrim
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for folder in map(str.strip, sys.stdin):
    try:
        net, plan = vitrim.load(folder)
        with torch.no_grad():
            logits = net(load_file(folder + "/images.safetensors")["images"])
        save_file({"logits": logits.contiguous()}, folder + "/logits.safetensors")
        print("done", flush=True)
    except Exception as error:
        print(repr(error).splitlines()[0], flush=True)
"""


class Loader:
    """Another process, which loads what was saved and runs it."""

    def __enter__(self) -> Loader:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _LOADER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def logits(self, folder: Path, images: Tensor) -> Tensor:
        """Return what the network saved in `folder` makes of `images`, in that process."""
        save_file({"images": images}, folder / "images.safetensors")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline().strip()
        _expect(said == "done", said)
        return load_file(folder / "logits.safetensors")["logits"]


@dataclass(kw_only=True)
class Case:
    """One network, its plan, and what becomes of it."""

    name: str
    args: Mapping[str, Any]

    @cached_property
    def dense(self) -> nn.Module:
        """The network, with random weights, in eval mode."""
        torch.manual_seed(0)
        net = timm.create_model(self.name, pretrained=False, **self.args)
        with torch.no_grad():
            for tensor in net.parameters():  # those that timm leaves at zero, too
                tensor.add_(0.02 * torch.randn(tensor.shape))
        return net.eval()

    @cached_property
    def images(self) -> Tensor:
        """Two images of the size that the network wants."""
        side = self.args.get("img_size")
        size = (side, side) if side else timm.get_pretrained_cfg(self.name).input_size
        generator = torch.Generator().manual_seed(1)
        return torch.randn(2, *image_shape(self.dense, size), generator=generator)

    @cached_property
    def cost(self) -> Cost:
        """The closed formula."""
        return Cost(self.dense, tuple(self.images.shape[1:]))

    @cached_property
    def plan(self) -> Plan:
        """The plan for half of the MACs, or the nearest share that can be reached."""
        described = self.cost.structure
        settings: dict[str, Any] = {"criterion": "group_l2", "ridge": 1e-3, "seed": 0}
        scores = {
            site.name: importance(self.dense, described, {}, site, **settings)
            for site in sites(self.dense).values()
        }
        return Plan(
            model={"name": self.name, "args": dict(self.args)}, edits=_nearest(self.cost, scores)
        )

    @cached_property
    def compact(self) -> nn.Module:
        """The network after the cut."""
        return cut(self.dense, self.plan)

    def masked(self) -> None:
        """Compare with the oracle."""
        dense, x = copy.deepcopy(self.dense).double(), self.images.double()
        with torch.no_grad():
            found, expected = cut(dense, self.plan)(x), masked(dense, self.plan)(x)
        _near(found, expected, 1e-12)

    def backward(self) -> None:
        """Compare which parameters have gradients, dense and compact."""
        dense, compact = (_without_gradient(net, self.images) for net in (self.dense, self.compact))
        _expect(compact <= dense, f"no gradient for {sorted(compact - dense)[:2]}")

    def counts(self) -> None:
        """Compare the counter with the formula and with the parameters."""
        found, formula = count(self.compact, self.cost.input_size), self.cost.plan(self.plan)
        _expect(found[:2] == formula[:2], f"counted {found[:2]}, formula {formula[:2]}")
        there = sum(tensor.numel() for tensor in self.compact.parameters())
        _expect(found.params == there, f"counted {found.params}, there are {there}")

    def load(self, loader: Loader) -> None:
        """Compare with what another process loads."""
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            found = loader.logits(save(folder, self.compact, self.plan), self.images)
            _expect(torch.equal(found, self.compact(self.images)), "other logits")

    def onnx(self) -> str:
        """Compare with onnxruntime, and return what there is to say."""
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = f"{folder}/net.onnx"
            try:
                _export(self.compact, self.images, path)
            except torch.onnx.OnnxExporterError:
                try:
                    _export(self.dense, self.images, path)
                except torch.onnx.OnnxExporterError:
                    return "dense too"
                raise
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            (found,) = session.run(None, {session.get_inputs()[0].name: self.images.numpy()})
            _near(torch.from_numpy(found), self.compact(self.images), 1e-4)
        return "ok"

    def row(self, loader: Loader, columns: Sequence[str] = COLUMNS) -> dict[str, str]:
        """Return what each column says, the shares of MACs and params kept, and the class."""
        try:
            kept = self.cost.plan(self.plan)
        except UnsupportedArchitecture:
            return {"class": type(self.dense).__name__, "refused": "yes"}
        except Exception as error:
            return {"class": _words(error)}
        checks: dict[str, Callable[[], str | None]] = {
            "masked": self.masked,
            "backward": self.backward,
            "counts": self.counts,
            "load": lambda: self.load(loader),
            "onnx": self.onnx,
        }
        dense = self.cost.dense_count
        return {
            "class": type(self.dense).__name__,
            "macs": f"{kept.macs / dense.macs:.3f}",
            "params": f"{kept.params / dense.params:.3f}",
            **{name: _said(checks[name]) for name in columns},
        }


def _nearest(cost: Cost, scores: Mapping[str, Tensor]) -> tuple[Keep, ...]:
    for share in SHARES:
        try:
            return trim(cost, scores, Target(metric="macs", keep=share), scope="site")
        except TargetError:
            continue
    raise TargetError("no share of the MACs can be reached")


def _said(check: Callable[[], str | None]) -> str:
    """Return `ok` or what the check says, or what was wrong: any error is a finding here."""
    try:
        return check() or "ok"
    except Exception as error:
        return _words(error)


def _export(net: nn.Module, images: Tensor, path: str) -> None:
    torch.onnx.export(net, (images,), path, dynamo=True, verbose=False)


def _words(error: Exception) -> str:
    """Return the first line of what an error says."""
    return f"{type(error).__name__}: {[*str(error).splitlines(), ''][0][:120]}"


def _without_gradient(net: nn.Module, images: Tensor) -> set[str]:
    """Return the parameters that a step in training mode leaves without a gradient."""
    twin = copy.deepcopy(net).train()
    twin(images).square().mean().backward()
    return {name for name, tensor in twin.named_parameters() if tensor.grad is None}


def _near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    _expect(error <= tolerance, f"off by {error:.1e}")


def _expect(fine: bool, otherwise: str) -> None:
    if not fine:
        raise AssertionError(otherwise)


def main() -> None:
    """Run the networks that the command line names, all by default."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("names", nargs="*", help="of timm; all by default")
    parser.add_argument("--small", action="store_true", help="small networks, in depth")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sys.exit(_in_depth(args.names, args.columns) if args.small else _by_name(args.names))


def _by_name(names: Sequence[str]) -> int:
    """Print a row for every name, and how many were supported and refused."""
    outcomes = []
    for name in names or sorted({*timm.list_models(), ARCHITECTURE}):
        outcomes.append(outcome_of(name))
        print(f"{name:48} {outcomes[-1].kind:9} {outcomes[-1].words}", flush=True)
    counts = Counter(outcome.kind for outcome in outcomes)
    whole = sum(outcome.n_branches > 0 for outcome in outcomes)
    print(
        f"{len(outcomes)} names: {counts['supported']} supported, {whole} of them with branches, "
        f"{counts['refused']} refused, {counts['FAILED']} failed"
    )
    return int(counts["FAILED"] > 0)


def _in_depth(names: Sequence[str], wanted: Sequence[str]) -> int:
    """Print a row for every small network, and how many passed."""
    columns = [name for name in wanted if name != "onnx" or find_spec("onnxruntime")]
    widths = (34, 28, 6, 7, *(9 for _ in COLUMNS))
    heads = dict(zip(("name", *ABOUT, *COLUMNS), widths, strict=True))

    def show(row: Mapping[str, str]) -> None:
        blank = "refused" if "refused" in row else "-"
        print(" ".join(row.get(key, blank).ljust(width) for key, width in heads.items()).rstrip())
        sys.stdout.flush()

    show({key: key for key in heads})
    rows = []
    with Loader() as loader:
        for name in names or NETWORKS:
            row = Case(name=name, args=NETWORKS.get(name, {})).row(loader, columns)
            rows.append(row)
            show({"name": name, **row})
    fine = {"ok", "dense too"}
    passed = sum(all(row.get(name) in fine for name in columns) for row in rows)
    refused = sum("refused" in row for row in rows)
    print(f"{passed} passed, {refused} refused, {len(rows) - passed - refused} failed")
    return int(passed + refused < len(rows))


if __name__ == "__main__":
    main()

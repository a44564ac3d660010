"""A method of somebody's own package passes the whole contract without an edit anywhere else."""

from pathlib import Path

from fresh import python

METHOD = '''
"""Depth pruning: blocks whose output points where their input points go (arXiv 2403.17887)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from lightning import LightningModule

from vitrim.budget.blocks import fewest
from vitrim.network import structure
from vitrim.network.structure import blocks_of
from vitrim.plan import Drop, Evidence, Proposal


@dataclass(frozen=True, kw_only=True, slots=True)
class AngularDistance:
    levels: Sequence[float]
    images: int
    metric: ClassVar[str] = "macs"
    granularity: ClassVar[str] = "block"

    def check(self, cost, target):
        if not target.is_identity:
            fewest(cost, target, [*blocks_of(cost.structure)], hint="")

    def scorer(self, net):
        return Angles(net, images=self.images)

    def plan(self, net, evidence, cost, target):
        blocks = blocks_of(cost.structure)
        order = sorted(blocks, key=lambda block: evidence.block_scores.get(block, 0.0))
        dropped = fewest(cost, target, order, hint="")
        edits = tuple(Drop(branch=name) for block in dropped for name in blocks[block])
        return Proposal(edits=edits, diagnostics={"scores": dict(evidence.block_scores)})


class Angles(LightningModule):
    epochs, resumes_at, clip_norm, trains = 1, "batch", 0.0, False

    def __init__(self, net, *, images):
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.calibration_images = images
        self.settings = {"images": images}
        self.blocks = [*blocks_of(structure(net))]
        self.register_buffer("angles", torch.zeros(len(self.blocks), dtype=torch.float64))

    def configure_optimizers(self):
        return None

    @torch.no_grad()
    def training_step(self, batch, batch_index):
        def add(index):
            def hook(module, args, output):
                x, y = args[0].flatten(0, -2).double(), output.flatten(0, -2).double()
                self.angles[index] += F.cosine_similarity(x, y, dim=-1).clamp(-1, 1).acos().sum()
            return hook

        modules = [self.net.eval().get_submodule(block) for block in self.blocks]
        hooks = [m.register_forward_hook(add(index)) for index, m in enumerate(modules)]
        self.net(batch[0])
        for hook in hooks:
            hook.remove()

    def evidence(self):
        seen = bool(self.angles.any())
        return Evidence(block_scores=dict(zip(self.blocks, self.angles.tolist())) if seen else {})
'''
YAML = """
_target_: own_methods.angular.AngularDistance
levels: [1.0, 0.85, 0.75, 0.6, 0.5, 0.4]
images: 128
"""


def test_a_method_of_another_package_passes_the_contract(tmp_path: Path) -> None:
    assert len(METHOD.strip().splitlines()) <= 70
    package = tmp_path / "own_methods"
    (package / "conf" / "method").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "angular.py").write_text(METHOD.lstrip())
    (package / "conf" / "method" / "angular.yaml").write_text(YAML.lstrip())
    done = python(
        *("-m", "pytest", "-q", "--no-header", "-p", "no:xdist", "tests/test_contract.py"),
        *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # of what is imported already
        cwd=Path(__file__).parents[1],
        VITRIM_CONTRACT_PACKAGE=str(package),
        PYTEST_XDIST_WORKER="",
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout

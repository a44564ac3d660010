"""Recovery in two processes: the weights are those of one process with batches twice as large."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_recovery import PLAIN, RECIPE, phase
from torch import Tensor

from jobs.test_distributed import in_two_processes
from nets import images, relative_error
from phase_runner import runner
from vitrim.jobs.distributed import process_group
from vitrim.trainer.views import Views

SCRIPT = "import test_recovery_ddp as tests; tests.recover({folder!r}, 2)"


def recover(folder: str, processes: int) -> None:
    """Recover a small network with 16 images a step; each process saves its weights."""
    module = phase(views=Views(**PLAIN), training=replace(RECIPE, epochs=1))
    place = Path(folder)
    run = runner(place, batch_size=16 // processes)
    options = {"devices": processes, **({"strategy": "ddp"} if processes > 1 else {})}
    run = replace(run, trainer=partial(run.trainer, **options))
    with process_group({"accelerator": "cpu", **options}):
        run.run_or_load(place / "x", module, name="x")
    rank = os.environ.get("RANK", "0")
    torch.save(module.net.state_dict(), place / f"weights{rank}.pt")


@pytest.mark.slow
def test_two_processes_recover_as_one_does(tmp_path: Path) -> None:
    recover(str(tmp_path / "one"), 1)
    folder = tmp_path / "two"
    in_two_processes(SCRIPT.format(folder=str(folder)))
    one, first, second = (
        torch.load(path)
        for path in (tmp_path / "one/weights0.pt", folder / "weights0.pt", folder / "weights1.pt")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert relative_error(*map(outputs_of, (first, one))) < 1e-4
    assert relative_error(*map(outputs_of, (phase().net.state_dict(), one))) > 1e-3


def outputs_of(weights: dict[str, Tensor]) -> Tensor:
    """Return logits: biases of keys, whose gradients are zero but for rounding, change none."""
    net = phase().net
    net.load_state_dict(weights)
    with torch.no_grad():
        logits: Tensor = net.eval()(images(8, dtype=torch.float32, batch=8)[:, :1])
    return logits

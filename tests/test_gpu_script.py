"""The script for a GPU works: every part on the CPU, with a tiny network."""

from __future__ import annotations

import pytest

from gpu import __main__ as script
from gpu import planning
from gpu.scale import FULL


def test_without_a_gpu_the_script_says_what_it_would_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    script.main(["latency", "planning"])
    said = capsys.readouterr().out
    assert "There is no GPU" in said
    assert "batch 1 and 64" in said
    assert "training:" not in said
    with pytest.raises(SystemExit):
        script.main(["speed"])


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("training", ("x timm's", "idle ", "ms a step")),
        ("latency", ("batch 1, eager: free padded", "over MACs", "even heads runs")),
        (
            "planning",
            ("rank, plan, cut, fold", "<= 2 s", "the same, closed forms on the CPU", "100.00%"),
        ),
        pytest.param(
            *("synthetic", ("an iteration of 2 images", "one fine-tuning on 500")),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_part_runs(
    part: str, found: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    script.main([part, "--tiny"])
    printed = capsys.readouterr().out
    assert all(text in printed for text in found)
    assert "failed" not in printed
    assert "on the CPU" in printed


def test_the_whole_size_is_that_of_the_goals() -> None:
    assert (FULL.device, FULL.name, FULL.batch) == ("cuda", "deit_base_patch16_224", 256)
    method = planning.method_of("oneshot", FULL.name)
    assert method.sampling.images <= planning.BATCHES * 64

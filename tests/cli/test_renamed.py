"""Former configuration keys are refused with one line that names the present one."""

from pathlib import Path

import pytest

from command import Command
from vitrim.cli.renamed import RENAMED, present_key, renamed_key


@pytest.mark.parametrize(
    ("words", "now"),
    [
        (["transfer=true"], "method=transfer"),
        (["method=dcvit", "method.together=2"], "method.group_size"),
        (["method=dcvit", "+method.spare=[1,1]"], "method.protected"),
        (["method=dcvit", "method.dream.smooth=0.1"], "method.synthetic.tv_weight"),
        (["method=oneshot", "method.tuning={pooled: 1.0}"], "method.tuning.pooled_weight"),
        (["method=practise", "method.adaptors=false"], "method.recoverability"),
        (["method=mixed_rank", "+method.sampling.given=5"], "available_images"),
    ],
)
def test_a_former_key_names_the_present_one(command: Command, words: list[str], now: str) -> None:
    done = command("data=none", *words)
    assert done.code == 1
    (line,) = [line for line in done.message.splitlines() if "renamed" in line]
    assert now in line


def test_a_former_key_in_an_experiment_file_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nmethod:\n  pace:\n    mlp: 1.0\n"
    (tmp_path / "mine" / "experiment" / "old.yaml").write_text(text)
    where = ("--config-dir", str(tmp_path / "mine"))
    done = command(*where, "experiment=old", "method=oneshot", "data=none")
    assert done.code == 1
    assert "method.pace was renamed: use method.site_rates" in done.message


def test_no_present_key_is_a_former_one() -> None:
    for now in RENAMED.values():
        assert present_key(now) == now
        assert renamed_key(now) is None

"""Command lines that are refused, and what they must leave behind."""

from __future__ import annotations

from command import QUICK, Command

TINY = ("method.gating.epochs=1", "method.fine_tuning.epochs=1", *QUICK)


def assert_refused(command: Command, *arguments: str, expected: list[str]) -> None:
    done = command(*arguments)
    assert done.code != 0
    for word in expected:
        assert word in done.message
    assert "Traceback" not in done.message
    assert not list(command.out.rglob("recipe.yaml"))

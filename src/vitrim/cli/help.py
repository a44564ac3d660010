"""What `vitrim --help` prints: Hydra's own help composes every group, which takes longer."""

from __future__ import annotations

from pathlib import Path

_GROUPS = ("model", "method", "data", "trainer", "teacher", "experiment")
_BASE = "base"
"""Folders of parts that choices share; they are no choices themselves."""


def help_text(conf: Path) -> str:
    """Return the help: the groups with their choices, and conf/run.yaml with its comments."""
    keys, _, _ = (conf / "run.yaml").read_text().partition("\nhydra:\n")
    return "\n".join(
        [
            "vitrim compresses vision transformers, and shows what it cost.",
            "",
            "vitrim [-m] [GROUP=CHOICE ...] [KEY=VALUE ...]     -m: values separated by commas",
            "vitrim --cfg job ...    the composed configuration; --hydra-help: Hydra's own flags",
            "",
            *(f"{group}: {', '.join(_choices(conf / group))}" for group in _GROUPS),
            "",
            keys,
        ]
    )


def _choices(group: Path) -> list[str]:
    """Return the choices of a group, as they are typed."""
    paths = sorted(path.relative_to(group).with_suffix("") for path in group.rglob("*.yaml"))
    return [path.as_posix() for path in paths if path.parts[0] != _BASE]

"""Experiments as they are typed: `experiment=vtp/imagenet100`, with the folder that it is in.

Hydra lists the files of one folder; its completion and its messages list those below as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType

from vitrim.cli.guard import wrap

GROUP = "experiment"
Options = Callable[..., list[str]]


def install() -> None:
    """Let Hydra find the experiments in folders, wherever it lists those of the group."""
    wrap(ConfigRepository, "get_group_options", _with_those_in_folders)


def _with_those_in_folders(options: Options) -> Options:
    def below(repository: ConfigRepository, group: str) -> list[str]:
        found = options(repository, group, ObjectType.CONFIG)
        for folder in options(repository, group, ObjectType.GROUP):
            found += [f"{folder}/{name}" for name in below(repository, f"{group}/{folder}")]
        return found

    @wraps(options)
    def listed(
        repository: ConfigRepository,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
    ) -> list[str]:
        if group_name == GROUP and results_filter is ObjectType.CONFIG:
            return sorted(below(repository, group_name))
        return options(repository, group_name, results_filter)

    return listed

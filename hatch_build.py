"""What `pip install -e .` in a clone installs: all that the commands of the README use."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.core import ProjectMetadata


class CustomBuildHook(BuildHookInterface):
    """Adds the packages of the extra `all` to what an editable vitrim depends on."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add them, unless this is a wheel to be published."""
        if version == "editable":
            metadata: ProjectMetadata[Any] = self.metadata
            build_data["dependencies"] += [
                *dict.fromkeys(metadata.core.optional_dependencies["all"])
            ]

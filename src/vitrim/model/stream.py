"""How a network's residual stream runs: what is added to it, branch by branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One step x + f(x) of the stream.

    `name` is the branch's module path as in `Structure.branches`, `before` that of the norm whose
    input is x; `apply` is f, norm and layer scale included; `scale` is the layer scale that its
    last Linear's output is multiplied by, (D,), or None.
    """

    name: str
    before: str
    apply: Callable[[Tensor], Tensor]
    scale: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The stream x (B, N, D) from the images on.

    `embed` makes it of images (B, C, H, W); `after` is the module path of the norm that reads it
    when all branches are through; of its tokens the first `prefix` are no patches, and the first
    `readout` of them are what the classifier reads.
    """

    embed: Callable[[Tensor], Tensor]
    branches: tuple[Branch, ...]
    after: str
    prefix: int
    readout: int

    def following(self, branch: Branch) -> str:
        """Return the path of the norm whose input is the stream after `branch`."""
        place = self.branches.index(branch) + 1
        return self.branches[place].before if place < len(self.branches) else self.after

"""What can be cut in a network, and the surgery.

`structure(net)` describes a network: its sites, branches, layers and attentions. `stream(net)`
describes its residual stream, `stepwise(net)` also one that only its own steps read.
`vitrim.network.surgery` cuts and masks by the description. Every module of `vitrim.network.family`
registers the network classes of one family. May import: plan, files, versions and errors.
"""

from __future__ import annotations

from vitrim.network import family
from vitrim.network.dispatch import (
    UnsupportedArchitecture,
    branches,
    drop_branch,
    fix_input_size,
    non_persistent_buffers,
    sites,
    stepwise,
    stream,
    structure,
)

__all__ = [
    "UnsupportedArchitecture",
    "branches",
    "drop_branch",
    "family",
    "fix_input_size",
    "non_persistent_buffers",
    "sites",
    "stepwise",
    "stream",
    "structure",
]

"""What can be cut in a network, and the surgery.

`structure` describes a network: its sites, branches, layers and attentions.
`vitrim.network.surgery` cuts and masks by that description. Every module of `vitrim.network.family`
registers the network classes of one family. May import: plan, files, versions and errors.
"""

from __future__ import annotations

from vitrim.network import family
from vitrim.network.dispatch import (
    UnsupportedArchitecture,
    branches,
    computed,
    drop,
    settle,
    sites,
    stream,
    structure,
)

__all__ = [
    "UnsupportedArchitecture",
    "branches",
    "computed",
    "drop",
    "family",
    "settle",
    "sites",
    "stream",
    "structure",
]

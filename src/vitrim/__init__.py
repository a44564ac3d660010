"""vitrim: compress vision transformers, and show what it cost.

>>> import vitrim
>>> vitrim.Keep(site="blocks.0.mlp.hidden", index=(0, 2)).index
(0, 2)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vitrim.deploy.registration import register as _register
from vitrim.errors import missing_package

if TYPE_CHECKING:
    from vitrim.api.callback import Prune as Prune
    from vitrim.api.compress import Compressed as Compressed
    from vitrim.api.compress import compress as compress
    from vitrim.api.scores import plan_for as plan_for
    from vitrim.api.scores import score as score
    from vitrim.api.scores import sites as sites
    from vitrim.api.scores import trim as trim
    from vitrim.deploy.hub import from_pretrained as from_pretrained
    from vitrim.deploy.hub import push_to_hub as push_to_hub
    from vitrim.measure import count as count
    from vitrim.model.huggingface import from_hf as from_hf
    from vitrim.network.adapters import adapter_targets as adapter_targets
    from vitrim.network.head_runs import arrange_heads as arrange_heads
    from vitrim.network.masking import masked as masked
    from vitrim.network.surgery import combine as combine
    from vitrim.network.surgery import cut as cut
    from vitrim.network.timing import fastest_heads as fastest_heads
    from vitrim.pipeline import Identity as Identity
    from vitrim.pipeline import Job as Job
    from vitrim.pipeline import run as run
    from vitrim.plan import Drop as Drop
    from vitrim.plan import Evidence as Evidence
    from vitrim.plan import Int8 as Int8
    from vitrim.plan import Keep as Keep
    from vitrim.plan import LowRank as LowRank
    from vitrim.plan import Plan as Plan
    from vitrim.store import load as load
    from vitrim.store import save as save

__version__ = "0.2.0"

_HOME = {
    "compress": "vitrim.api.compress",
    "Compressed": "vitrim.api.compress",
    **dict.fromkeys(("sites", "score", "trim", "plan_for"), "vitrim.api.scores"),
    "run": "vitrim.pipeline",
    "Job": "vitrim.pipeline",
    "Identity": "vitrim.pipeline",
    "load": "vitrim.store",
    "save": "vitrim.store",
    "cut": "vitrim.network.surgery",
    "masked": "vitrim.network.masking",
    "combine": "vitrim.network.surgery",
    "count": "vitrim.measure",
    "adapter_targets": "vitrim.network.adapters",
    "arrange_heads": "vitrim.network.head_runs",
    "fastest_heads": "vitrim.network.timing",
    "from_hf": "vitrim.model.huggingface",
    "from_pretrained": "vitrim.deploy.hub",
    "push_to_hub": "vitrim.deploy.hub",
    "Prune": "vitrim.api.callback",
    "Plan": "vitrim.plan",
    "Keep": "vitrim.plan",
    "LowRank": "vitrim.plan",
    "Drop": "vitrim.plan",
    "Int8": "vitrim.plan",
    "Evidence": "vitrim.plan",
}

__all__ = [*_HOME, "__version__"]

_register()


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `vitrim --help` must not wait for torch."""
    if name in _HOME:
        try:
            return getattr(import_module(_HOME[name]), name)
        except ModuleNotFoundError as error:
            missing = missing_package(error)
            if missing is None:
                raise
            raise missing from None
    raise AttributeError(f"module 'vitrim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

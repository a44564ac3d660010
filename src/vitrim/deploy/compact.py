"""The entrypoint by which timm builds and loads a compact network: `vitrim_compact`.

Importing this module registers it. A folder that vitrim exported names it as its architecture, with
the plan among the arguments, so that timm.create_model("local-dir:FOLDER", pretrained=True) works.
"""

from __future__ import annotations

import json
from functools import partial

import timm
import torch
from timm.models import build_model_with_cfg, register_model
from torch import nn

from vitrim.deploy.runfolder import Document
from vitrim.network import UnsupportedArchitecture
from vitrim.network.skeleton import skeleton
from vitrim.network.surgery import cut
from vitrim.plan import Plan, loads
from vitrim.store import assign

ARCHITECTURE = "vitrim_compact"


@register_model  # type: ignore[untyped-decorator]
def vitrim_compact(
    pretrained: bool = False, *, plan: Document | None = None, **kwargs: object
) -> nn.Module:
    """Build the compact network of `plan`, in its JSON form; `pretrained` loads its weights.

    Further arguments are those of the dense network; those not given are as in the plan. A new
    head, of another `num_classes`, starts at zero where weights are loaded.

    Raises:
        UnsupportedArchitecture: there is no plan.
        PlanError: it is malformed, or it does not fit its network.
    """
    build = partial(_build, plan=plan, random=not pretrained)
    net: nn.Module = build_model_with_cfg(build, ARCHITECTURE, pretrained, **kwargs)
    return net


def _build(*, plan: Document | None, random: bool, **args: object) -> nn.Module:
    """Return the compact network: with random weights, or with zeros to be overwritten."""
    if plan is None:
        raise UnsupportedArchitecture(
            f"{ARCHITECTURE} is no dense network: expected a plan, as the config.json of an export "
            "has; supported: names of dense networks, or from_run=FOLDER for a compact one"
        )
    exported = loads(json.dumps(plan))
    model = {"name": exported.model["name"], "args": {**exported.model["args"], **args}}
    changed = Plan(model=model, edits=exported.edits)
    net = skeleton(changed)  # checks the plan as well
    if random:
        return cut(timm.create_model(model["name"], **model["args"]), changed)
    zeros = {name: torch.zeros_like(t, device="cpu") for name, t in net.state_dict().items()}
    return assign(net, zeros, changed)

"""The entrypoint by which timm builds and loads a compact network: `vitrim_compact`.

`import vitrim` registers it. A folder that vitrim exported names it as its architecture, with the
plan among the arguments, so that timm.create_model("local-dir:FOLDER", pretrained=True) works.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, register_model
from torch import nn


@register_model  # type: ignore[untyped-decorator]
def vitrim_compact(
    pretrained: bool = False, *, plan: dict[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """Build the compact network of `plan`, the JSON form of one; `pretrained` loads its weights.

    Further arguments are those of the dense network: what is not said is as in the plan. A new
    head, of another `num_classes`, starts at zero where weights are loaded.

    Raises:
        PlanError: there is no plan, it is malformed, or it does not fit its network.
    """
    build = partial(_built, plan=plan, drawn=not pretrained)
    net: nn.Module = build_model_with_cfg(build, "vitrim_compact", pretrained, **kwargs)
    return net


def _built(*, plan: dict[str, Any] | None, drawn: bool, **args: Any) -> nn.Module:
    """Return the compact network: drawn at random, or zeros that wait for their values."""
    from vitrim.network.skeleton import skeleton
    from vitrim.network.surgery import cut
    from vitrim.plan import Plan, PlanError, loads
    from vitrim.store import assign

    if plan is None:
        raise PlanError("vitrim_compact: expected a plan, as the config.json of an export has")
    said = loads(json.dumps(plan))
    model = {"name": said.model["name"], "args": {**said.model["args"], **args}}
    merged = Plan(model=model, edits=said.edits)
    net = skeleton(merged)  # checks the plan, too
    if drawn:
        return cut(timm.create_model(model["name"], **model["args"]), merged)
    empty = {name: torch.zeros_like(t, device="cpu") for name, t in net.state_dict().items()}
    return assign(net, empty, merged)

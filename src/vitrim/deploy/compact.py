"""The entrypoint by which timm builds and loads a compact network: `vitrim_compact`.

`import vitrim` registers it (`vitrim.deploy.registration`). A folder that vitrim exported names it
as its architecture, with the plan among the arguments, so that
timm.create_model("local-dir:FOLDER", pretrained=True) works, and takes timm's own arguments:
num_classes, in_chans, img_size, features_only, out_indices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import timm
import torch
from timm.models import build_model_with_cfg
from timm.models._features import FeatureHookNet
from torch import Tensor, nn

from vitrim.deploy.runfolder import Document
from vitrim.network import UnsupportedArchitecture
from vitrim.network.skeleton import on_meta, shared_skeleton, skeleton
from vitrim.network.surgery import cut
from vitrim.plan import Plan, PlanError, loads
from vitrim.store import ARCHITECTURE, assign

_COPIED = (
    *("classifier", "first_conv", "mean", "std", "interpolation", "crop_pct", "crop_mode"),
    *("fixed_input_size", "license"),
)
"""What the description of a compact network shares with that of the dense network."""


def vitrim_compact(
    pretrained: bool = False, *, plan: Document | None = None, **kwargs: object
) -> nn.Module:
    """Build the compact network of `plan`, in its JSON form; `pretrained` loads its weights.

    Further arguments are those of the dense network; those not given are as in the plan, the number
    of classes as well. A new head, of another `num_classes`, starts at zero where weights are
    loaded. Position embeddings are resampled to another `img_size`, as timm does.

    Raises:
        UnsupportedArchitecture: there is no plan.
        PlanError: it is malformed, does not fit its network, or its weights have no `img_size`.
    """
    if plan is None:
        raise UnsupportedArchitecture(
            f"{ARCHITECTURE} is no dense network: expected a plan, as the config.json of an export "
            "has; supported: names of dense networks, or from_run=FOLDER for a compact one"
        )
    build = _Builder(loads(json.dumps(plan)), random=not pretrained)
    if kwargs.get("pretrained_cfg") is None:
        kwargs["pretrained_cfg"] = build.description()
    if kwargs.get("features_only"):
        kwargs["feature_cfg"] = build.features(kwargs)
    net: nn.Module = build_model_with_cfg(
        build, ARCHITECTURE, pretrained, pretrained_filter_fn=build.fitted, **kwargs
    )
    return net


class _Builder:
    """Builds the network of one plan, with random weights or with zeros to be overwritten."""

    def __init__(self, plan: Plan, *, random: bool) -> None:
        self.plan = plan
        self.random = random
        self.args: dict[str, object] = dict(plan.model["args"])

    def __call__(self, **args: object) -> nn.Module:
        """Return the compact network; `args` change those of the plan."""
        self.args = {**self.plan.model["args"], **args}
        plan = Plan(model={**self.plan.model, "args": self.args}, edits=self.plan.edits)
        if self.random:
            skeleton(plan)  # checks the plan
            return cut(timm.create_model(plan.model["name"], **self.args), plan)
        return _zeros(plan)

    def description(self) -> dict[str, object]:
        """Return timm's description of the compact network: its classes and its images."""
        net, args = shared_skeleton(self.plan.model), self.plan.model["args"]
        known: Document = net.pretrained_cfg  # type: ignore[assignment]
        channels, height, width = known["input_size"]
        size = args.get("img_size") or (height, width)
        height, width = (size, size) if isinstance(size, int) else size
        return {
            **{key: known[key] for key in _COPIED if known.get(key) is not None},
            "architecture": ARCHITECTURE,
            "num_classes": net.num_classes,
            "input_size": (args.get("in_chans", channels), height, width),
        }

    def features(self, kwargs: Mapping[str, object]) -> dict[str, object]:
        """Return how timm extracts features from the dense network: class and settings."""
        name, args = self.plan.model["name"], self.plan.model["args"]
        chosen = {key: kwargs[key] for key in ("out_indices",) if key in kwargs}
        with on_meta():
            usual = timm.create_model(name, features_only=True, **args, **chosen)
            recorded = timm.create_model(
                name, features_only=True, feature_cls=_FeatureSettings, **args, **chosen
            )
        return {**recorded.settings, "feature_cls": type(usual)}

    def fitted(self, state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
        """Return the saved tensors, resampled where `net` takes images of another size."""
        if not _differing(net, state):
            return state
        twin = _zeros(self.plan)
        twin.load_state_dict(state)
        sizes = {key: self.args[key] for key in ("img_size", "window_size") if key in self.args}
        if callable(resize := getattr(twin, "set_input_size", None)):
            resize(**sizes)
        if names := _differing(net, resized := twin.state_dict()):
            raise PlanError(
                f"img_size={sizes.get('img_size')}: {', '.join(names[:3])} cannot be resampled; "
                "leave img_size out"
            )
        return resized


class _FeatureSettings(FeatureHookNet):  # type: ignore[misc]
    """Records the settings with which timm would extract features."""

    def __init__(self, model: nn.Module, **settings: object) -> None:
        nn.ModuleDict.__init__(self)
        self.settings = settings


def _zeros(plan: Plan) -> nn.Module:
    net = skeleton(plan)  # checks the plan as well
    zeros = {name: torch.zeros_like(t, device="cpu") for name, t in net.state_dict().items()}
    return assign(net, zeros, plan)


def _differing(net: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors of other shapes than in `net`, those aside that timm itself adapts."""
    described: Document = net.pretrained_cfg  # type: ignore[assignment]
    adapted: list[str] = []
    for key in ("first_conv", "classifier"):
        value = described.get(key) or ()
        adapted += [value] if isinstance(value, str) else [*value]
    return [
        name
        for name, tensor in net.state_dict().items()
        if name in state
        and tensor.shape != state[name].shape
        and name.rpartition(".")[0] not in adapted
    ]

"""`vitrim.Prune`: the callback that compresses the network inside anybody's LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim import Optimizer

from vitrim.api.gates import Gates
from vitrim.api.given import image_shape
from vitrim.api.request import Options
from vitrim.api.settings import build_method, method_names
from vitrim.budget.cost import Cost
from vitrim.budget.target import METRICS, Target, resolve_target
from vitrim.errors import ConfigError
from vitrim.method import Method, TrainsGates
from vitrim.model.identify import Identified, at_path, cuttable, identify, unwrapped
from vitrim.network.structure import Structure
from vitrim.plan import Evidence, Plan
from vitrim.prune import Slicing

_OWN_TRAINING = ("gating", "fine_tuning")


class Prune(Callback):
    """Train a network with gates in its own training, and slice it when the fit ends.

    The module's own loss, optimiser, augmentation and averaging train. Before the optimisers are
    made, gates are put on the weights of the network of timm inside the module. Every step adds the
    gradient of l1 * sum |gate|. At the end of the fit the gates are folded into the weights, which
    changes no output, and the units with the smallest gates are removed from a copy.

        prune = vitrim.Prune(macs=0.6, gate_lr=1e-2)
        Trainer(max_epochs=20, callbacks=[prune]).fit(module, loader)
        Trainer(max_epochs=20).fit(MyModule(prune.compact), loader)

    Args:
        method: name of a method that trains gates: vtp.
        strength: 0 (nothing is removed) to 5, in place of a budget.
        module: path of the network in the LightningModule; None: there is one.
        network: `name` and `args` of timm.create_model for it; None: they are found.
        seed: of the order of units where all gates are equal.
        **settings: a budget: macs, params or units, a fraction or a number. And keys of
            conf/method/vtp.yaml with their values; `gate_lr` is the peak learning rate of the
            gates, by default that of their weights.

    Raises:
        ConfigError: a key is unknown or has no effect here, or the method trains no gates.
    """

    compact: nn.Module
    """The compact network, on the device of the module."""
    plan: Plan
    """What was removed: `vitrim.save(folder, prune.compact, prune.plan)`."""

    def __init__(
        self,
        method: str = "vtp",
        *,
        strength: float | None = None,
        module: str | None = None,
        network: Mapping[str, object] | None = None,
        seed: int = 0,
        **settings: object,
    ) -> None:
        budget: dict[str, object] = {
            name: settings.pop(name) for name in METRICS if name in settings
        }
        self.options = Options(
            method=method, strength=strength, budget=budget, settings=settings, seed=seed
        )
        for key in settings:
            if key.partition(".")[0] in _OWN_TRAINING:
                raise ConfigError(f"{key}: the module's own optimiser trains; leave it out")
        self.method = _gated(build_method(method, settings, seed=seed), method)
        self.target = _target(self.options, self.method)
        self.module = module
        self.network = network
        self._gate_lr = self.method.gate_lr if "gate_lr" in settings else None
        self._gates: Gates | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put gates on the network, before the optimisers are made.

        Raises:
            VitrimError: the module holds no network that can be cut, or several of them; or the
                method cannot reach its target on it.
        """
        if stage != "fit" or self._gates is not None:
            return
        _check_order(trainer, self)
        net = self._network_in(pl_module)
        self._found = identify(net, self.network)
        shape, _ = image_shape(self._found)
        self._cost = Cost(self._found.net, shape[1:])
        self.method.check(self._cost, self.target)
        if not self.target.is_identity:
            described = self._cost.structure
            self._gates = Gates(net, self.method.gates(described), _sizes(described))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the gates their parameter group."""
        if self._gates is None:
            return
        if not trainer.optimizers:
            raise ConfigError("vitrim.Prune: the module has no optimiser that could train gates")
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._gates.set_rate(trainer.optimizers, schedulers, self._gate_lr)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient of the L1 term, once per step, however many batches it has."""
        if self._gates is not None:
            self._gates.add_l1(optimizer, self.method.l1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold the gates, and set `plan` and `compact`."""
        net = self._network_in(pl_module)
        slicing = Slicing(self.method, self._cost, self.target, name=self.options.name)
        if self._gates is None:
            slicing.keep_all(net)
        else:
            evidence = Evidence(scores=self._gates.scores())
            self._gates.fold()
            self._gates = None
            slicing.slice(net, evidence)
        self.compact = slicing.compact
        notes = {"strength": self.options.strength, **slicing.plan.provenance}
        self.plan = replace(slicing.plan, model=self._found.model, provenance=notes)

    def _network_in(self, pl_module: LightningModule) -> nn.Module:
        """Return the network to compress in a LightningModule."""
        if self.module is not None:
            return unwrapped(at_path(pl_module, self.module, "module"))
        paths = cuttable(pl_module)
        if len(paths) == 1:
            return pl_module.get_submodule(paths[0])
        name = type(pl_module).__name__
        if not paths:
            raise ConfigError(
                f"{name} holds no network of timm that can be cut when the fit begins: make it in "
                "__init__ as an attribute of the module"
            )
        raise ConfigError(
            f"{name} holds several networks: name one of them, "
            f"module={' or '.join(repr(path) for path in paths)}"
        )

    _found: Identified
    _cost: Cost


def _gated(method: Method, name: str) -> TrainsGates:
    """Return a method that trains gates.

    Raises:
        ConfigError: it does not; naming those that do.
    """
    if isinstance(method, TrainsGates):
        return method
    others = [other for other in method_names() if isinstance(build_method(other), TrainsGates)]
    raise ConfigError(
        f"method={name!r} trains no gates: expected {' or '.join(others)}; for {name}, call "
        f"vitrim.compress(network, images, {name!r}, ...) after the fit"
    )


def _target(options: Options, method: TrainsGates) -> Target:
    """Return the target of a counted budget."""
    target = resolve_target(
        options.strength,
        options.budget,  # type: ignore[arg-type]
        levels=method.levels,
        metric=method.metric,
        where=f"method={options.name!r}",
    )
    if target.is_time:
        raise ConfigError(
            f"{target.metric}={target.keep}: the callback measures no time; expected macs, params "
            "or units"
        )
    return target


def _sizes(described: Structure) -> dict[str, int]:
    return {name: site.size for name, site in described.sites.items()}


def _check_order(trainer: Trainer, prune: Prune) -> None:
    """Refuse an averaging of weights that copies the network before it has gates."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback is prune:
            return
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise ConfigError(
                f"callbacks: put vitrim.Prune before {type(callback).__name__}, which copies the "
                "network"
            )

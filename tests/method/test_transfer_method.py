"""Transfer: a method that removes nothing and trains."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from nets import SIZE, small_net
from targets import target_of
from vitrim.budget.cost import Cost
from vitrim.budget.target import TargetError
from vitrim.cli.compose import CONF
from vitrim.errors import ConfigError
from vitrim.method import Compensates, Recovers, check_method
from vitrim.method.transfer import Transfer
from vitrim.plan import Evidence
from vitrim.trainer.classify import Classify
from vitrim.trainer.recipe import Recipe

TRAINING = Recipe(epochs=3, lr=1e-3, weight_decay=0.0, warmup_epochs=0.0, clip_norm=1.0)
METHOD = Transfer(training=TRAINING)


def test_it_is_a_method_that_recovers_and_compensates_nothing() -> None:
    check_method(METHOD)
    assert isinstance(METHOD, Recovers)
    assert not isinstance(METHOD, Compensates)


def test_nothing_is_removed_and_the_whole_network_is_trained() -> None:
    net, cost = small_net(), Cost(small_net(), SIZE)
    target = target_of(METHOD, 0)
    METHOD.check(cost, target)
    assert target.is_identity
    assert METHOD.plan(net, Evidence(), cost, target).edits == ()
    (phase,) = METHOD.recovery(net, net, Evidence(), 7)
    assert isinstance(phase, Classify)
    assert (phase.net, phase.epochs, phase.clip_norm) == (net, 3, 1.0)


def test_a_target_and_scoring_are_refused() -> None:
    with pytest.raises(TargetError, match="removes nothing: set strength=0 and no target"):
        target_of(METHOD, 3)
    with pytest.raises(TargetError, match="removes nothing"):
        target_of(METHOD, 0, macs=0.5)
    with pytest.raises(ConfigError, match="method=transfer removes nothing"):
        METHOD.scorer(small_net())


def test_the_training_is_that_of_the_model() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", overrides=["experiment=transfer", "model.training.epochs=7"])
    found = instantiate(cfg.method, _convert_="all")
    assert isinstance(found, Transfer)
    assert found.training.epochs == 7
    assert cfg.strength == 0

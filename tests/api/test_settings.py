"""Methods built from conf/method/ without Hydra are those that the command builds."""

from collections.abc import Mapping
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from vitrim.api.settings import CONF, build_method, method_names, method_settings
from vitrim.errors import ConfigError
from vitrim.method import check_method


def composed(name: str, *overrides: str) -> Mapping[str, Any]:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        words = [f"method={name}", "model=vit_tiny", "seed=3", *overrides]
        cfg = hydra.compose("run", overrides=words)
    settings = OmegaConf.to_container(cfg.method, resolve=True)
    assert isinstance(settings, dict)
    return settings


def test_all_methods_that_compress_are_known() -> None:
    files = {path.stem for path in (CONF / "method").glob("*.yaml")}
    assert {*method_names()} == files - {"transfer"}
    assert len(files) > 9


@pytest.mark.parametrize("name", method_names())
def test_a_method_has_the_settings_of_the_command(name: str) -> None:
    network = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    expected = composed(name, f"model.name={network}")
    assert method_settings(name, seed=3, network=network) == expected
    check_method(build_method(name, seed=3, network=network))


def test_keywords_change_numbers_as_words_of_the_command_do() -> None:
    changes = {
        "sampling.images": 8,
        "tuning": {"recovery": {"training.epochs": 2}},
        "sites": ("qk",),
    }
    words = ("method.sampling.images=8", "method.tuning.recovery.training.epochs=2")
    expected = composed("oneshot", *words, "method.sites=[qk]", "model.name=x")
    assert method_settings("oneshot", changes, seed=3, network="x") == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("onshot", {}, "did you mean 'oneshot'"),
        ("base/recovery", {}, "expected one of"),
        ("transfer", {}, "expected one of"),
        ("vtp", {"gating": {"epoch": 3}}, "unknown key gating.epoch of method='vtp'; did you mean"),
        ("vtp", {"_target_": "os.system"}, "unknown key _target_"),
        ("vtp", {"gating": 3}, "gating=3: expected a mapping with keys of optimizer"),
        ("vtp", {"l1": object()}, "expected a number"),
        ("oneshot", {"sampling.images": 0}, "method.sampling.images=0"),
    ],
)
def test_what_cannot_work_is_refused(name: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build_method(name, changes)

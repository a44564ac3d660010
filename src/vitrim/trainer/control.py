"""The control: the dense network, trained for as long as the compact one was.

A compact network that has more training behind it than the dense one may be more accurate for that
reason alone. The control has the same training, and nothing was cut.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from vitrim.files import digest
from vitrim.trainer.classify import Classify
from vitrim.trainer.distillation import Distillation
from vitrim.trainer.phases import PhaseRunner
from vitrim.trainer.recipe import Recipe

NAME = "control"


def control_entry(
    runner: PhaseRunner | None,
    dense: nn.Module,
    recipes: Sequence[Recipe],
    key: str,
    distillation: Distillation | None = None,
) -> dict[str, object]:
    """Train a copy of `dense` by the recipes, in order; return what reports say of it.

    Runs share its phases if `key` and recipes are equal. Without recipes nothing is trained, and
    the entry is empty.

    Args:
        runner: of the phases; None: there are no images.
        dense: the network that is compressed; not changed.
        recipes: of the training that the compact network has with labels.
        key: digest of what decides the dense network and its images.
        distillation: the teacher in the last training, which is the fine-tuning.
    """
    if runner is None or not recipes:
        return {}
    net, accuracy = copy.deepcopy(dense), None
    for number, recipe in enumerate(recipes, 1):
        phase = Classify(net, recipe=recipe, n_classes=int(str(dense.num_classes)))
        decided: list[object] = [before.settings() for before in recipes[:number]]
        if number == len(recipes) and distillation is not None:
            phase.learn_from(distillation)
            decided.append(distillation.settings)
        folder = runner.shared / f"{NAME}-{digest([key, decided])}"
        runner.run_or_load(folder, phase, name=NAME if number == 1 else f"{NAME}-{number}")
        if number == len(recipes):
            accuracy = runner.evaluate(folder, net, int(str(dense.num_classes)))
    epochs = sum(recipe.epochs for recipe in recipes)
    percent = {name: None if accuracy is None else accuracy[name] for name in ("top1", "top5")}
    return {NAME: {**percent, "epochs": epochs}}

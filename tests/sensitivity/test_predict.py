"""Predicted losses, scaled to what was measured."""

import pytest
import torch

from nets import images, small_net
from vitrim.sensitivity.predict import predict, probes_of, rising, scaled
from vitrim.sensitivity.scorer import LossScorer
from vitrim.sensitivity.settings import LossRidges, Scaling
from vitrim.trainer.calibrate import Sampling


def test_scaled_losses_sum_to_what_was_measured() -> None:
    losses = torch.tensor([4.0, 1.0, 2.0, 3.0])
    found = scaled(losses, [(0.5, 2.0), (1.0, 2.0)])
    assert torch.allclose(found, 2 * losses.double(), atol=1e-9)
    hull = rising(torch.tensor([1.0, 3.0, 1.0, 5.0]))
    assert hull.diff().min() > 0
    assert float(hull.sum()) == pytest.approx(10.0)


def test_what_is_tried_out_has_the_types_of_the_parameters() -> None:
    net = small_net(patch_size=8, dtype=torch.float32)
    scorer = LossScorer(
        net,
        kinds=["mlp", "qk", "v", "ranks", "branches"],
        sampling=Sampling(images=4, tokens=None, class_token_weight=1.0),
        temperature=2.0,
        ridges=LossRidges(order=1e-3, fold=1e-3, metric=1e-6, gradient_shrinkage=0.3),
        scaling=Scaling(images=4, shares=[0.5]),
    )
    scorer.observe(images(dtype=torch.float32, batch=4))
    statistics = scorer.statistics
    statistics.finish()
    found = predict(net, scorer.parts, statistics, ridges=scorer.ridges, unit=0.125)
    probes = probes_of(net, scorer.parts, statistics, found, scorer.scaling, scorer.ridges)
    assert {probe.kind for probe in probes} == {"hidden", "qk", "v", "ranks", "branches"}
    assert {value.dtype for probe in probes for value in probe.values.values()} == {torch.float32}

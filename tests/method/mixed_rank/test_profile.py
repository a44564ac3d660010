"""What the scorer of low-rank methods gathers, against the same by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nets import images, small_net
from vitrim.closed_form.moments import MomentsError
from vitrim.method.mixed_rank.metric import Decomposition
from vitrim.method.mixed_rank.pieces import Piece
from vitrim.method.mixed_rank.profile import Profile
from vitrim.trainer.activations import capture
from vitrim.trainer.calibrate import Sampling

ALL = Sampling(images=24, tokens=None, class_token_weight=1.0)
LAYERS = ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"]
PIECES = {
    "blocks.0.attn.qkv.k": Piece("blocks.0.attn.qkv", 24, 24, 24),
    "blocks.0.attn.qkv": Piece("blocks.0.attn.qkv", 0, 72, 24),
    "blocks.1.mlp.fc2": Piece("blocks.1.mlp.fc2", 0, 24, 48),
}


def profiled(decomposition: Decomposition, *, gradient_images: int = 0, batch: int = 8) -> Profile:
    phase = Profile(
        small_net(),
        pieces=PIECES,
        decomposition=decomposition,
        sampling=ALL,
        gradient_images=gradient_images,
    )
    phase.on_train_start()
    for at in range(0, 24, batch):
        phase.training_step((images(batch=24)[at : at + batch], None), at)
    phase.on_train_end()
    return phase


def inputs(name: str) -> Tensor:
    net = small_net()
    with torch.no_grad(), capture(net, [(name, False)]) as flows:
        net(images(batch=24))
    return flows[name]


@pytest.mark.parametrize("decomposition", ["asvd", "normalised_output", "mean_input", "loss"])
def test_statistics_within_autocast_are_those_of_full_precision(
    decomposition: Decomposition,
) -> None:
    found = []
    for enabled in (False, True):
        net = small_net(dtype=torch.float32)
        phase = Profile(
            net, pieces=PIECES, decomposition=decomposition, sampling=ALL, gradient_images=5
        )
        phase.on_train_start()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            phase.training_step((images(batch=8, dtype=torch.float32), None), 0)
        phase.on_train_end()
        found.append(phase.evidence().moments)
    for name, tensors in found[0].items():
        for what, tensor in tensors.items():
            assert torch.equal(found[1][name][what], tensor), (name, what)


@pytest.mark.parametrize("batch", [5, 24])
def test_second_moments_are_those_of_the_inputs(batch: int) -> None:
    found = profiled("whitening", batch=batch).evidence().moments
    for name in LAYERS:
        x = inputs(name).flatten(0, 1)
        second = found[name]["cov"].double() + torch.outer(found[name]["mean"], found[name]["mean"])
        assert torch.allclose(second, x.T @ x / len(x), atol=1e-5)


def test_normalised_outputs_weigh_tokens_by_them() -> None:
    found = profiled("normalised_output").evidence().moments
    for name in LAYERS:
        x = inputs(name).flatten(0, 1)
        weights = 1 / (x @ small_net().get_parameter(f"{name}.weight").T).square().sum(1)
        expected = (x * weights[:, None]).T @ x / weights.sum()
        mean = found[name]["mean"]
        assert torch.allclose(
            found[name]["cov"].double() + torch.outer(mean, mean), expected.detach(), atol=1e-5
        )


def test_magnitudes_and_mean_inputs() -> None:
    sizes = profiled("asvd").evidence().moments
    tokens = profiled("mean_input").evidence().moments
    for name in LAYERS:
        assert torch.allclose(sizes[name]["abs"], inputs(name).abs().mean((0, 1)))
        assert torch.allclose(tokens[name]["tokens"], inputs(name).mean(0))


def gradients(net: nn.Module) -> dict[str, list[Tensor]]:
    """Return by layer what every logit's derivatives are, (images x tokens, out) each."""
    with capture(net, [(name, True) for name in LAYERS]) as flows:
        logits = net(images(batch=24))
    return {
        name: [
            torch.autograd.grad(logit.sum(), flows[name], retain_graph=True)[0].flatten(0, 1)
            for logit in logits.T
        ]
        for name in LAYERS
    }


def test_gradients_are_those_of_all_logits_on_average() -> None:
    found = profiled("loss", gradient_images=24, batch=2).evidence().moments
    for name, gradients_of in gradients(small_net()).items():
        total = sum(gradient.square().sum(0) for gradient in gradients_of) / 24
        ratio = found[name]["gradient_squares"].sum() / total.sum()  # type: ignore[union-attr]
        assert 0.6 < float(ratio) < 1.5  # one draw of signs per image


def test_products_are_second_moments_of_gradients() -> None:
    found = profiled("loss", gradient_images=24, batch=2).evidence().moments
    net = small_net()
    gradients_of = gradients(net)
    for name, piece in PIECES.items():
        rows = torch.cat(gradients_of[piece.layer])[:, piece.start : piece.start + piece.rows]
        if piece.rows > piece.columns:
            rows = rows @ piece.of(net.get_parameter(f"{piece.layer}.weight"))
        expected, products = rows.T @ rows / 24, found[name]["gradient_products"]
        assert products.shape == (min(piece.rows, piece.columns),) * 2
        assert 0.6 < float(products.trace() / expected.trace()) < 1.5
        along = (products * expected).sum() / (products.norm() * expected.norm())
        assert float(along) > 0.8
    fc2 = found["blocks.1.mlp.fc2"]
    assert torch.allclose(fc2["gradient_products"].diagonal(), fc2["gradient_squares"])


def test_only_gradient_images_are_differentiated() -> None:
    some = profiled("loss", gradient_images=3, batch=8).evidence().moments
    assert all(float(some[name]["gradient_squares"].sum()) > 0 for name in LAYERS)
    assert all(parameter.grad is None for parameter in profiled("loss").net.parameters())


def test_settings_tell_results_apart_and_results_come_back() -> None:
    phase = profiled("loss", gradient_images=4)
    other = Profile(
        small_net(), pieces=PIECES, decomposition="loss", sampling=ALL, gradient_images=4
    )
    assert phase.settings == other.settings
    assert phase.settings != profiled("asvd").settings
    assert other.evidence().moments == {}


def test_numbers_that_are_not_finite_are_an_error_naming_the_layer() -> None:
    phase = Profile(
        small_net(), pieces=PIECES, decomposition="asvd", sampling=ALL, gradient_images=0
    )
    with pytest.raises(MomentsError, match=r"blocks\.0\.attn\.qkv"):
        phase.training_step((torch.full((2, 3, 32, 32), torch.nan, dtype=torch.float64), None), 0)

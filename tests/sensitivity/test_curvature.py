"""Curvature: its directions and gradients against the definitions."""

import pytest
import torch

from vitrim.sensitivity.curvature import directions, score_gradients


def test_directions_have_the_hessian_of_the_divergence() -> None:
    logits = torch.randn(1, 4, dtype=torch.float64) * 3
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([directions(logits, 2.0, generator) for _ in range(20_000)]).double()
    p = (logits[0] / 2).softmax(0)
    assert torch.allclose(draws.mT @ draws / len(draws), p.diag() - p.outer(p), atol=0.01)
    change = 1e-3 * torch.randn(4, dtype=torch.float64)
    q = ((logits[0] + change) / 2).softmax(0)
    divergence = float((p * (p.log() - q.log())).sum())
    assert divergence == pytest.approx(float((draws @ change).square().mean()) / 8, rel=0.05)


def test_gradients_by_the_scores_are_those_of_autograd() -> None:
    scores = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    attn = scores.softmax(-1)
    (gradient,) = torch.autograd.grad((attn * weights).sum(), scores)
    assert torch.allclose(score_gradients(attn.detach(), weights), gradient.square())

"""Spectral norms of whole weights, and when they are computed again."""

from __future__ import annotations

import math

import pytest
import torch

from entropy_monitor.hooks import layer_sigmas
from entropy_monitor.hooks.layer_sigmas import LayerSigmas


def norm(w: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(w.double(), 2))


def test_each_weight_is_followed_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(90, 80, generator=generator) for _ in range(2))
    sigmas, starts = LayerSigmas(), []
    compute = layer_sigmas.measures.leading_singular_value

    def counted(w: torch.Tensor, start: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        starts.append(start is not None)
        return compute(w, start)

    monkeypatch.setattr(layer_sigmas.measures, "leading_singular_value", counted)
    for _ in range(2):  # micro-batches of one step
        assert sigmas.sigma("a", "query", q, 1).item() == pytest.approx(norm(q), rel=1e-3)
        assert sigmas.sigma("a", "key", k, 1).item() == pytest.approx(norm(k), rel=1e-3)
    assert starts == [False, False]
    assert sigmas.sigma("a", "query", 2 * q, 2).item() == pytest.approx(2 * norm(q), rel=1e-3)
    sigmas.begin()
    q.data.mul_(3)  # which no version tells
    assert sigmas.sigma("a", "query", q, 2).item() == pytest.approx(norm(q), rel=1e-3)
    assert starts == [False, False, True, True]


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_weight_with_nothing_to_follow_gets_a_fresh_start(value: float) -> None:
    sigmas, empty = LayerSigmas(), torch.full((90, 80), value)
    first = sigmas.sigma("a", "output", empty, 1)
    assert first == 0 if value == 0 else first.isnan()
    w = torch.randn(90, 80, generator=torch.Generator().manual_seed(1))
    assert sigmas.sigma("a", "output", w, 2).item() == pytest.approx(norm(w), rel=1e-3)


def test_what_was_not_the_weight_is_forgotten() -> None:
    sigmas = LayerSigmas()
    sigmas.sigma("a", "value", torch.ones(4, 4), 1)
    sigmas.forget("a", "value")
    assert sigmas.sigma("a", "value", 2 * torch.ones(4, 4), 1).item() == pytest.approx(8.0)

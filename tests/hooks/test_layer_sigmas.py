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
    sigmas, starts, looks = LayerSigmas(), [], []
    compute = layer_sigmas.measures.leading_singular_value

    def counted(w: torch.Tensor, start: torch.Tensor | None, look: int) -> tuple[torch.Tensor, torch.Tensor]:
        starts.append(start is not None)
        looks.append(look)
        return compute(w, start, look)

    monkeypatch.setattr(layer_sigmas.measures, "leading_singular_value", counted)
    for factor in (1, 2):
        q.data.mul_(factor)
        assert sigmas.sigma("a", "query", q).item() == pytest.approx(norm(q), rel=1e-3)
        assert sigmas.sigma("a", "key", k).item() == pytest.approx(norm(k), rel=1e-3)
    assert starts == [False, False, True, True]
    sigmas.forget("a", "key")
    sigmas.sigma("a", "key", k)
    assert starts[4:] == [False]
    assert len(set(looks)) == len(looks)  # each looks another way for what the vectors have missed


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_weight_with_nothing_to_follow_gets_a_fresh_start(value: float) -> None:
    sigmas, empty = LayerSigmas(), torch.full((90, 80), value)
    first = sigmas.sigma("a", "output", empty)
    assert first == 0 if value == 0 else first.isnan()
    w = torch.randn(90, 80, generator=torch.Generator().manual_seed(1))
    assert sigmas.sigma("a", "output", w).item() == pytest.approx(norm(w), rel=1e-3)

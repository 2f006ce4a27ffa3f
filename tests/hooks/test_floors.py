from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entropy_monitor import measure, measures
from entropy_monitor.hooks import floors as hooks_floors
from entropy_monitor.hooks.calls import Inputs
from entropy_monitor.hooks.floors import _activation_floor
from tests.measures.cases import random


def true_floor(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """From exact norms, in float64."""
    k_norm = torch.linalg.matrix_norm(k.double(), 2)[..., None]
    n = torch.full(q.shape[:3], float(k.shape[2]), dtype=torch.float64)
    return measures.entropy_lower_bound(scale * k_norm * q.double().norm(dim=-1), n)


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_a_floor_is_exact_or_0_where_it_is_below_a_thousandth(spread: float) -> None:
    q, k = spread * random(2, 3, 40, 8), spread * random(2, 3, 50, 8, seed=1)
    stats = measures.row_statistics(q, k, scale=0.3)
    got = _activation_floor(Inputs(q, k, scale=0.3), None, stats, torch.tensor(0.3)).double()
    want = true_floor(q, k, 0.3)
    assert (got <= want + 1e-6).all()
    if (got == 0).all():
        assert want.max() < 1e-3
    else:
        torch.testing.assert_close(got, want, rtol=0.02, atol=1e-4)


def test_both_ways_are_taken() -> None:
    for spread, vacuous in ((0.1, False), (8.0, True)):
        q, k = spread * random(2, 3, 40, 8), spread * random(2, 3, 50, 8, seed=1)
        stats = measures.row_statistics(q, k, scale=0.3)
        floor = _activation_floor(Inputs(q, k, scale=0.3), None, stats, torch.tensor(0.3))
        assert bool((floor == 0).all()) == vacuous


class Turned(nn.Module):
    """Attention with rotary embeddings, and so without a weight floor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
        q, k = (
            torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
            for a, b in (q.chunk(2, -1), k.chunk(2, -1))
        )
        return F.scaled_dot_product_attention(q, k, v)


def test_norms_of_inputs_are_not_computed_where_the_weight_floor_does_not_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    for name in ("norm_at_least", "activation_norm"):
        compute = getattr(hooks_floors.measures, name)
        monkeypatch.setattr(
            hooks_floors.measures, name, lambda x, f=compute: seen.append(tuple(x.shape)) or f(x)
        )
    table = measure(Turned(), random(3, 6, 16))
    assert table["floor_weights"].isna().all()
    assert table["sigma_qk"].notna().all()
    assert math.isfinite(table["floor_activation"].iloc[0])
    assert set(seen) == {(3, 2, 6, 8)}  # keys alone

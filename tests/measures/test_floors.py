from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entropy_monitor.measures import (
    ROUNDING_TOLERANCE,
    critical_sigma,
    entropy_lower_bound,
    floor_activation,
    floor_paper,
    floor_row,
    floor_weights,
    minimising_logits,
    row_statistics,
    row_statistics_from_logits,
    sigma_qk,
    spectral_norm,
    spectral_norm_bound,
)

seeds = st.integers(0, 2**31)
spreads = st.floats(0.05, 4.0)


class Attention(NamedTuple):
    """One random attention with plain projections, and what its floors need."""

    q: Tensor
    k: Tensor
    x: Tensor
    w_q: Tensor
    w_k: Tensor
    b_q: Tensor
    mask: Tensor | None
    causal: bool
    scale: float


def random_attention(
    seed: int, spread: float, causal: bool, biased: bool, query_bias: float = 0.0, aligned: bool = False
) -> Attention:
    g = torch.Generator().manual_seed(seed)
    B, H, T, d, dh = 2, 2, 12, 6, 4
    x = torch.randn(B, T, d, generator=g) * spread
    w_q = torch.randn(H, d, dh, generator=g)
    w_k = w_q.clone() if aligned else torch.randn(H, d, dh, generator=g)
    b_q = torch.randn(H, dh, generator=g) * query_bias
    b_k = torch.randn(H, dh, generator=g) * 3  # must cancel
    q = torch.einsum("btd,hde->bhte", x, w_q) + b_q[:, None]
    k = torch.einsum("btd,hde->bhte", x, w_k) + b_k[:, None]
    slopes = torch.tensor([0.25, 1.0])[:, None, None]
    distance = (torch.arange(T)[:, None] - torch.arange(T)).abs()
    mask = -slopes * distance * 2 if biased else None
    return Attention(q, k, x, w_q, w_k, b_q, mask, causal, 0.5)


def floors(a: Attention, with_bias: bool = True, with_query_bias: bool = True) -> dict[str, Tensor]:
    s = row_statistics(a.q, a.k, mask=a.mask, is_causal=a.causal, scale=a.scale)
    bias_norm = s.bias_norm if with_bias else torch.zeros_like(s.bias_norm)
    shift = torch.einsum("hde,he->hd", a.w_k, a.b_q).norm(dim=-1)[:, None]
    sigma = sigma_qk(a.w_q, a.w_k)[:, None]
    return {
        "entropy": s.entropy,
        "num_keys": s.num_keys,
        "floor_row": floor_row(s.logit_norm, s.num_keys),
        "floor_activation": floor_activation(
            a.scale, spectral_norm(a.k)[..., None], a.q.norm(dim=-1), bias_norm, s.num_keys
        ),
        "floor_weights": floor_weights(
            a.scale,
            spectral_norm(a.x)[:, None, None],
            sigma,
            a.x.norm(dim=-1)[:, None],
            shift if with_query_bias else 0.0,
            bias_norm,
            s.num_keys,
        ),
        "floor_paper": floor_paper(sigma, s.num_keys),
    }


@given(seed=seeds, spread=spreads, causal=st.booleans(), biased=st.booleans(), bias=st.floats(0, 3))
@settings(max_examples=60, deadline=None)
def test_no_entropy_lies_below_a_floor(
    seed: int, spread: float, causal: bool, biased: bool, bias: float
) -> None:
    got = floors(random_attention(seed, spread, causal, biased, bias))
    for name in ("floor_row", "floor_activation", "floor_weights"):
        assert (got[name] <= got["entropy"] + ROUNDING_TOLERANCE).all(), name
    assert (got["floor_row"] >= got["floor_activation"] - ROUNDING_TOLERANCE).all()


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=200), st.floats(-1e3, 1e3, width=32))
@settings(max_examples=300, deadline=None)
def test_no_logits_lie_below_floor_row(logits: list[float], shift: float) -> None:
    u = torch.tensor(logits) + shift
    s = row_statistics(u.view(1, 1, 1, -1), torch.eye(len(u))[None, None], scale=1.0)
    assert floor_row(s.logit_norm, s.num_keys).item() <= s.entropy.item() + ROUNDING_TOLERANCE


@pytest.mark.parametrize("keys", [2, 10, 1000, 131_072])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_rounding_at_the_minimiser_stays_within_the_tolerance(keys: int, share: float) -> None:
    # Rows for which entropy and floor are equal: here rounding alone decides, and the tolerance must hold it.
    sigma = critical_sigma(share * math.log(keys), keys)
    u = minimising_logits(sigma, keys)
    for shift in (0.0, 37.0, -300.0):
        s = row_statistics_from_logits((u + shift).float().view(1, 1, 1, -1))
        gap = s.entropy - floor_row(s.logit_norm, s.num_keys)
        assert gap.item() > -ROUNDING_TOLERANCE
        assert abs(gap.item()) < 1e-2 * share * math.log(keys) + 2 * ROUNDING_TOLERANCE


@pytest.mark.parametrize("keys", [2, 16, 1024, 65_536])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
def test_rounding_where_the_activation_floor_is_reached(keys: int, share: float) -> None:
    # Keys along the query, logits at the minimiser: every inequality on the way is an equality.
    g = torch.Generator().manual_seed(keys)
    u = minimising_logits(critical_sigma(share * math.log(keys), keys), keys)
    direction = torch.randn(64, generator=g, dtype=torch.float64)
    k = (u[:, None] * direction / direction.square().sum()).float()[None, None]
    q = direction.float()[None, None, None]
    s = row_statistics(q, k, scale=1.0)
    for k_norm in (spectral_norm(k), spectral_norm_bound(k)):
        floor = floor_activation(1.0, k_norm[..., None], q.norm(dim=-1), s.bias_norm, s.num_keys)
        assert floor.item() <= s.entropy.item() + ROUNDING_TOLERANCE
        # Nearly equal indeed: norms are lifted by √T eps, and B's slope is up to (log T)² / 4.
        assert floor.item() == pytest.approx(s.entropy.item(), abs=2e-3)


def violations(leave_out: str) -> float:
    """The furthest that an entropy lies below what a floor becomes when one of its terms is left out."""
    worst, query_bias = 0.0, 6.0 if leave_out == "query_bias" else 0.0
    for seed in range(8):
        for spread in (0.05, 0.3):
            a = random_attention(seed, spread, True, leave_out == "bias_norm", query_bias)
            got = floors(a, leave_out != "bias_norm", leave_out != "query_bias")
            names = ["floor_weights"] if leave_out == "query_bias" else ["floor_weights", "floor_activation"]
            excess = [(got[n] - got["entropy"]).amax().item() for n in names]
            worst = max(worst, min(excess))
    return worst


def test_a_floor_without_its_bias_terms_is_violated() -> None:
    # The checks above can fail: each of these terms is needed.
    assert violations("bias_norm") > 0.1
    assert violations("query_bias") > 0.1
    assert violations("nothing") < ROUNDING_TOLERANCE


def test_the_papers_curve_is_no_floor() -> None:
    got = floors(random_attention(0, 3.0, False, False, aligned=True))
    assert (got["floor_paper"] > got["entropy"] + 0.1).any()


def test_causal_rows_count_their_own_keys() -> None:
    got = floors(random_attention(1, 0.001, True, False))
    assert got["num_keys"][0, 0].tolist() == list(range(1, 13))
    for name in ("floor_row", "floor_activation", "floor_weights"):
        near = got["num_keys"].log()
        torch.testing.assert_close(got[name], near, atol=0.05, rtol=0)
        assert (got[name][..., 0] == 0).all()


def test_soft_capped_logits_stay_above_the_activation_floor() -> None:
    a = random_attention(2, 2.0, False, True)
    s = row_statistics(a.q, a.k, mask=a.mask, scale=a.scale, softcap=2.0)
    floor = floor_activation(
        a.scale, spectral_norm(a.k)[..., None], a.q.norm(dim=-1), s.bias_norm, s.num_keys
    )
    assert (floor <= s.entropy + ROUNDING_TOLERANCE).all()


def test_the_formulas_of_the_table() -> None:
    f = torch.tensor
    n = f(10.0)
    assert floor_row(f(3.0), n).item() == pytest.approx(entropy_lower_bound(3.0, 10), abs=2e-5)
    got = floor_activation(-0.5, f(2.0), f(3.0), f(0.25), n).item()
    assert got == pytest.approx(entropy_lower_bound(0.5 * 2 * 3 + 0.25, 10), abs=2e-5)
    got = floor_weights(f(0.5), f(2.0), f(1.5), f(0.7), f(0.3), f(0.25), n).item()
    assert got == pytest.approx(entropy_lower_bound(0.5 * 2 * (1.5 * 0.7 + 0.3) + 0.25, 10), abs=2e-5)
    assert floor_paper(f(3.0), n).item() == pytest.approx(entropy_lower_bound(3.0, 10), abs=2e-5)


def test_rounding_lowers_a_floor() -> None:
    norm = torch.linspace(0, 20, 500)
    n = torch.tensor([2.0, 50.0, 5000.0])[:, None]
    exact = entropy_lower_bound(norm.double(), n.double())
    assert (floor_row(norm, n).double() <= exact + 2e-6).all()
    assert (floor_row(norm, n).double() >= exact - ROUNDING_TOLERANCE).all()


def test_a_norm_that_is_not_known_leaves_the_floor_not_known() -> None:
    one, nan = torch.ones(1), torch.full((1,), math.nan)
    assert floor_row(nan, one * 4).isnan().all()
    for i in range(1, 4):
        norms = [nan if i == j else one for j in range(1, 4)]
        assert floor_activation(1.0, *norms, one * 4).isnan().all()
    for i in range(1, 6):
        norms = [nan if i == j else one for j in range(1, 6)]
        assert floor_weights(1.0, *norms, one * 4).isnan().all()
    assert floor_paper(nan, one * 4).isnan().all()

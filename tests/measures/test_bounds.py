from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import critical_sigma, entropy_lower_bound, minimising_logits
from tests.measures import oracle

sigmas = st.floats(0.0, 60.0)
counts = st.integers(2, 64)


def entropy_of(logits: list[float]) -> float:
    return oracle.one_row(logits, [True] * len(logits), [0.0] * len(logits)).entropy


@given(sigma=sigmas, keys=counts)
@settings(max_examples=200, deadline=None)
def test_tight_at_the_minimiser(sigma: float, keys: int) -> None:
    logits = minimising_logits(sigma, keys)
    assert logits.norm().item() == pytest.approx(sigma, abs=1e-12)
    assert logits.sum().item() == pytest.approx(0, abs=1e-11)
    assert entropy_lower_bound(sigma, keys) == pytest.approx(
        entropy_of(logits.tolist()), rel=1e-9, abs=1e-300
    )


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_logits_lie_below(logits: list[float]) -> None:
    mean = math.fsum(logits) / len(logits)
    for norm in (math.hypot(*logits), math.hypot(*(x - mean for x in logits))):
        assert entropy_of(logits) >= entropy_lower_bound(norm, len(logits)) * (1 - 1e-12) - 1e-14


def test_minimisation_finds_nothing_lower() -> None:
    g = torch.Generator().manual_seed(0)
    sigma, keys = 2.5, 6
    free = torch.randn(20, keys, generator=g, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.1)
    for _ in range(150):
        u = sigma * free / free.norm(dim=-1, keepdim=True)
        entropy = torch.special.entr(u.softmax(-1)).sum(-1)
        optimizer.zero_grad()
        entropy.sum().backward()
        optimizer.step()
    bound = entropy_lower_bound(sigma, keys)
    assert entropy.min().item() >= bound - 1e-12
    assert entropy.min().item() == pytest.approx(bound, abs=1e-6)


@given(sigma=sigmas, more=st.floats(0.01, 10.0), keys=counts)
@settings(max_examples=200, deadline=None)
def test_falls_strictly_with_sigma(sigma: float, more: float, keys: int) -> None:
    assert entropy_lower_bound(sigma + more, keys) < entropy_lower_bound(sigma, keys)


@given(share=st.floats(1e-9, 0.99), keys=st.integers(2, 10**6))
@settings(max_examples=200, deadline=None)
def test_the_inverse_undoes_the_bound(share: float, keys: int) -> None:
    entropy = share * math.log(keys)
    sigma = critical_sigma(entropy, keys)
    assert entropy_lower_bound(sigma, keys) == pytest.approx(entropy, rel=1e-9)


def test_the_inverse_on_tensors_agrees_with_floats() -> None:
    entropy = torch.tensor([1e-6, 0.1, 1.0, 2.0, 3.0, 0.0, -1.0, math.nan])
    got = critical_sigma(entropy, 16)
    assert got.dtype == torch.float32
    want = [critical_sigma(e, 16) for e in entropy[:6].tolist()] + [math.inf, math.nan]
    assert got.tolist() == pytest.approx(want, rel=1e-6, nan_ok=True)


def test_the_inverse_at_its_ends() -> None:
    assert critical_sigma(math.log(8), 8) == 0
    assert critical_sigma(5.0, 8) == 0
    assert critical_sigma(0.0, 8) == math.inf
    assert critical_sigma(0.0, 1) == 0
    assert critical_sigma(0.0, 0) == 0
    assert critical_sigma(1e-300, 8) < math.inf


@pytest.mark.parametrize("keys", [2, 16, 1024, 10**6])
def test_stable_from_zero_to_infinity(keys: int) -> None:
    assert entropy_lower_bound(0.0, keys) == pytest.approx(math.log(keys), rel=1e-14)
    for sigma in (1e6, 1e30, 1e300, math.inf):
        assert entropy_lower_bound(sigma, keys) == 0
    grid = torch.cat([torch.zeros(1), torch.logspace(-8, 8, 400), torch.tensor([1e38, math.inf])])
    bounds = entropy_lower_bound(grid, keys)
    assert bounds.isfinite().all()
    assert (bounds >= 0).all()
    assert (bounds.diff() <= 4 * torch.finfo(torch.float32).eps * bounds[:-1]).all()
    exact = torch.tensor([entropy_lower_bound(s, keys) for s in grid.tolist()], dtype=torch.float64)
    torch.testing.assert_close(bounds.double(), exact, rtol=3e-5, atol=5e-6)


def test_small_bounds_keep_their_digits() -> None:
    # δ = 300 - far past where 1 + x rounds to 1.
    delta, keys = 300.0, 9
    x = (keys - 1) * math.exp(-delta)
    assert entropy_lower_bound(delta * math.sqrt(8 / 9), keys) == pytest.approx(x * (1 + delta), rel=1e-9)


def test_one_key_or_none() -> None:
    for sigma in (0.0, 3.0, math.inf):
        assert entropy_lower_bound(sigma, 1) == 0
        assert entropy_lower_bound(sigma, 0) == 0
    counts = torch.tensor([0.0, 1.0, 2.0])
    assert entropy_lower_bound(torch.tensor(0.0), counts).tolist() == pytest.approx([0, 0, math.log(2)])


def test_types_and_shapes() -> None:
    assert isinstance(entropy_lower_bound(1.0, 5), float)
    sigma = torch.rand(3, 1)
    keys = torch.tensor([2, 3, 4, 5])  # integers count too
    got = entropy_lower_bound(sigma, keys)
    assert got.shape == (3, 4)
    assert got.dtype == torch.float32
    assert entropy_lower_bound(sigma.double(), keys).dtype == torch.float64
    assert entropy_lower_bound(sigma.bfloat16(), 4).dtype == torch.float32
    assert entropy_lower_bound(2.0, keys).shape == (4,)


def test_not_known_stays_not_known() -> None:
    sigma = torch.tensor([math.nan, -1.0, 1.0, 1.0])
    keys = torch.tensor([1.0, 4.0, math.nan, 4.0])
    assert entropy_lower_bound(sigma, keys).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("bad", [-0.5, math.nan])
def test_a_number_that_cannot_be_is_refused(bad: float) -> None:
    with pytest.raises(ConfigurationError, match=f"sigma must be 0 or more, got {bad}"):
        entropy_lower_bound(bad, 4)
    with pytest.raises(ConfigurationError, match=f"num_keys must be 0 or more, got {bad}"):
        entropy_lower_bound(1.0, bad)
    with pytest.raises(ConfigurationError, match=f"entropy must be 0 or more, got {bad}"):
        critical_sigma(bad, 4)
    with pytest.raises(ConfigurationError, match=f"sigma must be 0 or more, got {bad}"):
        minimising_logits(bad, 4)
    with pytest.raises(ConfigurationError, match="num_keys must be at least 1, got 0"):
        minimising_logits(1.0, 0)


def test_tensors_wait_for_no_device() -> None:
    sigma = torch.zeros(3, device="meta")
    assert entropy_lower_bound(sigma, 4).shape == (3,)
    assert critical_sigma(sigma, sigma).shape == (3,)

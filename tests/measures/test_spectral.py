from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import (
    head_norms,
    sigma_qk,
    spectral_entropy,
    spectral_norm,
    spectral_norm_bound,
    update_spectral_norm_bound,
)
from entropy_monitor.measures._gram import grams
from tests.measures.cases import random, true_norm


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(random(n, n))[0]


MATRICES = {
    "square": random(3, 50, 50),
    "tall": random(2, 2, 300, 20),
    "wide": random(20, 300),
    "rank_one": random(40, 1) @ random(1, 30, seed=1),
    "orthogonal": orthogonal(64),
    "single": torch.tensor([[-3.0]]),
    "tiny": random(30, 20) * 1e-30,
    "huge": random(30, 20) * 1e30,
    "bfloat16": random(40, 30).bfloat16(),
    "float16": random(40, 30).half(),
    "near_ties": torch.diag(torch.linspace(0.99, 1.0, 100)),
    "decaying": torch.diag(torch.logspace(0, -6, 50)),
    "large": random(300, 200),
}


@pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES.keys())
def test_norm_is_right_and_on_the_upper_side(w: Tensor) -> None:
    got, want = spectral_norm(w), true_norm(w)
    assert got.dtype == torch.float32
    assert got.shape == w.shape[:-2]
    assert (got.double() >= want).all()
    assert (got.double() <= want * (1 + 1e-5)).all()


@pytest.mark.parametrize("squarings", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES.keys())
def test_bound_is_certified_and_as_close_as_stated(w: Tensor, squarings: int) -> None:
    got, want = spectral_norm_bound(w, squarings).double(), true_norm(w)
    rank = torch.linalg.matrix_rank(w.double()).max().item()
    assert (got >= want).all()
    assert (got <= want * rank ** (0.5 ** (squarings + 2)) * (1 + 2e-5)).all()


def test_bound_overstates_as_far_as_stated_where_all_singular_values_are_equal() -> None:
    got = spectral_norm_bound(orthogonal(64)).item()
    assert got == pytest.approx(64 ** (1 / 256), rel=1e-5)
    assert got == pytest.approx(1.016, abs=1e-3)


def test_power_iteration_would_have_been_too_low_where_the_bound_is_not() -> None:
    w = random(256, 256)
    v = torch.ones(256) / 16
    for _ in range(5):
        v = torch.nn.functional.normalize(w.T @ (w @ v), dim=0)
    assert (w @ v).norm() < 0.97 * true_norm(w)
    assert spectral_norm_bound(w) >= true_norm(w)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_bounds_stay_certified_when_products_are_allowed_to_round(precision: str) -> None:
    w = random(200, 100)
    torch.set_float32_matmul_precision(precision)
    try:
        for function in (spectral_norm, spectral_norm_bound):
            assert true_norm(w) <= function(w) <= true_norm(w) * 1.02
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_float64_stays_float64() -> None:
    w = random(30, 20).double()
    for function in (spectral_norm, spectral_norm_bound, spectral_entropy):
        assert function(w).dtype == torch.float64
    torch.testing.assert_close(spectral_norm(w), true_norm(w), rtol=1e-13, atol=0)
    assert sigma_qk(random(2, 9, 4).double(), random(1, 9, 4)).dtype == torch.float64


@pytest.mark.parametrize("function", [spectral_norm, spectral_norm_bound])
def test_degenerate_matrices(function: Callable[[Tensor], Tensor]) -> None:
    w = torch.stack(
        [torch.zeros(4, 3), random(4, 3), torch.full((4, 3), math.nan), torch.full((4, 3), math.inf)]
    )
    w[3, 0, 0] = 1.0
    got = function(w)
    assert got[0] == 0
    assert got[1].item() == pytest.approx(true_norm(w[1]).item(), rel=0.02)
    assert got[2:].isnan().all()
    assert function(torch.zeros(2, 0, 5)).tolist() == [0, 0]
    assert function(torch.zeros(0, 4, 5)).shape == (0,)


def test_many_matrices_are_taken_a_few_at_a_time() -> None:
    w = random(6, 5, 40, 8)
    for whole, parts in zip(grams(w), grams(w, max_bytes=10_000), strict=True):
        assert torch.equal(whole, parts)


def test_bounds_wait_for_no_device() -> None:
    assert spectral_norm_bound(torch.zeros(4, 20, 6, device="meta")).shape == (4,)


@pytest.mark.parametrize(
    "function",
    [
        spectral_norm_bound,
        spectral_entropy,
        lambda w: sigma_qk(w, w[:2]),
        lambda w: head_norms(w, w[:2])[2],
        lambda w: update_spectral_norm_bound(w, w + 1),
    ],
)
def test_compiles_without_a_graph_break(function: Callable[[Tensor], Tensor]) -> None:
    w = random(4, 30, 8)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(w), function(w))


def test_autocast_rounds_nothing() -> None:
    w = random(4, 60, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = spectral_norm(w), spectral_norm_bound(w), sigma_qk(w, w), spectral_entropy(w)
    outside = spectral_norm(w), spectral_norm_bound(w), sigma_qk(w, w), spectral_entropy(w)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


def test_default_dtype_and_device_do_not_matter() -> None:
    w = random(4, 60, 16)
    std = random(4, 60, 16, seed=1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            results = [
                spectral_norm(w),
                spectral_norm_bound(w),
                sigma_qk(w, w),
                spectral_entropy(w),
                update_spectral_norm_bound(w, std),
            ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in results} == {torch.float32}
    assert {x.device.type for x in results} == {"cpu"}


@pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES.keys())
def test_spectral_entropy_against_singular_values(w: Tensor) -> None:
    p = torch.linalg.svdvals(w.double()).square()
    p = p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(
        spectral_entropy(w).double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=2e-5
    )


def test_spectral_entropy_at_its_ends() -> None:
    assert spectral_entropy(orthogonal(32)).item() == pytest.approx(math.log(32), rel=1e-5)
    assert spectral_entropy(torch.ones(9, 5)).item() == pytest.approx(0, abs=2e-5)
    assert spectral_entropy(torch.zeros(9, 5)).isnan()
    assert spectral_entropy(torch.zeros(0, 5)).isnan()
    assert spectral_entropy(torch.full((2, 3), math.nan)).isnan()


@pytest.mark.parametrize("shape", [(40, 40), (60, 20), (20, 60), (3, 25, 25)])
def test_the_ideal_adam_update_is_at_least_as_large(shape: tuple[int, ...]) -> None:
    for noise in (0.0, 0.1, 1.0, 10.0):
        mu, n = random(*shape), noise * random(*shape, seed=1)
        update = mu / (mu.square() + n.square()).sqrt()
        got = update_spectral_norm_bound(mu, n).double()
        assert (got <= true_norm(update) * (1 + 1e-6)).all()
        share = (n.double() ** 2 / (mu.double() ** 2 + n.double() ** 2)).mean((-2, -1))
        want = math.sqrt(max(shape[-2:])) * (1 - share).sqrt()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_the_update_bound_is_reached() -> None:
    # Signs of a Hadamard matrix: all singular values are √w.
    h = torch.ones(1, 1)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    got = update_spectral_norm_bound(h, torch.zeros_like(h))
    assert got.item() == pytest.approx(4.0)
    assert true_norm(h).item() == pytest.approx(4.0)


def test_update_bound_of_small_and_absent_gradients() -> None:
    mu, n = random(8, 8), random(8, 8, seed=1)
    small = update_spectral_norm_bound(mu * 1e-30, n * 1e-30)
    assert small.item() == pytest.approx(update_spectral_norm_bound(mu, n).item(), rel=1e-5)
    zero = torch.zeros(4, 4)
    assert update_spectral_norm_bound(zero, zero) == 0
    assert update_spectral_norm_bound(zero, torch.ones(4, 4)) == 0
    assert update_spectral_norm_bound(torch.full((2, 2), math.nan), torch.ones(2, 2)).isnan()


def test_what_does_not_fit_is_refused() -> None:
    for function in (spectral_norm, spectral_norm_bound, spectral_entropy):
        with pytest.raises(ConfigurationError, match=r"needed, got torch.float32 of shape \(3,\)"):
            function(torch.zeros(3))
    with pytest.raises(ConfigurationError, match=r"got torch.int64"):
        spectral_norm(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="squarings must be 0 or more, got -1"):
        spectral_norm_bound(torch.zeros(3, 3), -1)
    with pytest.raises(ConfigurationError, match=r"one shape, got \(2, 3\) and \(3, 2\)"):
        update_spectral_norm_bound(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ConfigurationError, match=r"with one d_head, got \(2, 9, 4\) and \(2, 9, 5\)"):
        sigma_qk(torch.zeros(2, 9, 4), torch.zeros(2, 9, 5))
    with pytest.raises(ConfigurationError, match=r"multiple of the number of key heads, got \(3, 9, 4\)"):
        sigma_qk(torch.zeros(3, 9, 4), torch.zeros(2, 9, 4))

"""Norms of heads from one Gram matrix each, against singular values in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import activation_norm, bias_norm, head_norm, head_norms
from entropy_monitor.measures._top_eigenvalue import top_eigenvalue
from tests.measures.cases import random, true_norm
from tests.measures.test_sigma_qk import PAIRS, naive_sigma_qk, singular

WORST = 2.5e-3  # what the docstring states


def orthonormal(heads: int, d: int, dh: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(heads, d, dh, seed=seed))[0]


CASES = {
    **PAIRS,
    "orthonormal": (orthonormal(2, 80, 64), orthonormal(2, 80, 64, seed=1)),
    "two_equal": (
        orthonormal(2, 64, 32) * torch.cat([torch.full((2,), 3.0), torch.ones(30)]),
        random(2, 64, 32),
    ),
    "half_equal": (orthonormal(2, 64, 32) * torch.linspace(0.5, 1.5, 32).clamp(max=1.0), random(2, 64, 32)),
    "rank_one": (singular(2, 64, 16, 1, 0), singular(2, 64, 16, 1, 1)),
    "huge": (random(2, 40, 8) * 1e16, random(2, 40, 8, seed=1) * 1e16),
    "heads_of_a_linear_layer": (
        random(48, 96).view(3, 16, 96).mT,
        random(48, 96, seed=1).view(3, 16, 96).mT,
    ),
    "wide_head": (random(1, 300, 256), random(1, 300, 256, seed=1)),
}


@pytest.mark.parametrize(("w_q", "w_k"), CASES.values(), ids=CASES.keys())
def test_norms_are_close_and_on_the_upper_side(w_q: Tensor, w_k: Tensor) -> None:
    group = w_q.shape[0] // w_k.shape[0]
    norm_q, norm_k = true_norm(w_q), true_norm(w_k).repeat_interleave(group)
    together = naive_sigma_qk(w_q, w_k)
    sigma_q, sigma_k, sigma_qk = (x.double() for x in head_norms(w_q, w_k))
    for got, want in ((sigma_q, norm_q), (sigma_k, norm_k), (head_norm(w_q).double(), norm_q)):
        assert (got >= want).all()
        assert (got <= want * (1 + WORST)).all()
    assert (sigma_qk >= together).all()
    assert (sigma_qk <= together * (1 + WORST) + 5e-4 * norm_q * norm_k).all()


def test_random_heads_come_out_far_closer() -> None:
    w_q, w_k = random(6, 384, 64), random(6, 384, 64, seed=1)
    got = head_norms(w_q, w_k)
    for value, want in zip(got, (true_norm(w_q), true_norm(w_k), naive_sigma_qk(w_q, w_k)), strict=True):
        torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=0)


def test_the_bound_reaches_where_it_is_loosest() -> None:
    """A projection on half of the space has neither a gap nor small row sums."""
    Q = orthonormal(1, 128, 64)[0].double()
    got = top_eigenvalue((Q @ Q.T)[None]).item()
    assert 1.0 <= got <= 64 ** (1 / 2**10) * (1 + 1e-6)
    assert got > 1.001


def test_degenerate_heads() -> None:
    w_q, w_k = random(4, 20, 6), random(2, 20, 6, seed=1)
    w_q[0, 3, 3] = math.inf
    w_q[1] = 0
    sigma_q, sigma_k, sigma_qk = head_norms(w_q, w_k)
    assert sigma_q.isnan().tolist() == [True, False, False, False]
    assert sigma_q[1] == 0
    assert sigma_qk[0].isnan()
    assert sigma_qk[1] == 0
    assert sigma_k.isfinite().all()
    torch.testing.assert_close(sigma_qk[2:].double(), naive_sigma_qk(w_q[2:], w_k[1:]), rtol=1e-3, atol=0)
    assert head_norm(torch.zeros(2, 0, 5)).tolist() == [0, 0]


def test_no_device_is_waited_for() -> None:
    w = torch.zeros(4, 20, 6, device="meta")
    assert [x.shape for x in head_norms(w, w[:2])] == [(4,)] * 3
    assert head_norm(w).shape == (4,)
    assert bias_norm(w[:2], torch.zeros(4, 6, device="meta")).shape == (4,)


def test_float64_stays_and_autocast_rounds_nothing() -> None:
    w_q, w_k = random(4, 60, 16), random(2, 60, 16, seed=1)
    assert {x.dtype for x in head_norms(w_q.double(), w_k)} == {torch.float64}
    plain = head_norms(w_q, w_k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head_norms(w_q, w_k)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_a_query_bias_moves_logits_by_its_image() -> None:
    w_k, b = random(2, 30, 8), random(6, 8, seed=1)
    want = torch.stack([(w_k[h // 3].double() @ b[h].double()).norm() for h in range(6)])
    torch.testing.assert_close(bias_norm(w_k, b).double(), want, rtol=2e-6, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="multiple of the number of key heads"):
        head_norms(torch.zeros(3, 9, 4), torch.zeros(2, 9, 4))
    with pytest.raises(ConfigurationError, match="floating matrix"):
        head_norm(torch.zeros(3, 3, 3, dtype=torch.int64))


@pytest.mark.parametrize(("heads", "width", "size"), [(2, 1024, 1), (2, 4096, 1), (1, 256, 8), (4, 4096, 64)])
def test_equal_numbers_that_all_round_the_same_way(heads: int, width: int, size: int) -> None:
    for value in (0.0123, 0.0377, 0.1, 0.0713, 0.35, 0.9):
        w = torch.full((heads, width, size), value).half()
        want = true_norm(w)
        assert (head_norm(w).double() >= want).all()
        assert (activation_norm(w).double() >= want).all()
        biases = torch.ones(heads, size)
        assert (bias_norm(w, biases).double() >= want * size**0.5).all()

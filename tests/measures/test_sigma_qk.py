from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from entropy_monitor.measures import head_norms, sigma_qk, spectral
from tests.measures.cases import random, true_norm

Function = Callable[[Tensor, Tensor], Tensor]


def bound(w_q: Tensor, w_k: Tensor) -> Tensor:
    return head_norms(w_q, w_k)[2]


def naive_sigma_qk(w_q: Tensor, w_k: Tensor) -> Tensor:
    group = w_q.shape[0] // w_k.shape[0]
    products = [w_k[h // group].double() @ w_q[h].double().T for h in range(w_q.shape[0])]
    return torch.stack([true_norm(p) for p in products])


def singular(heads: int, d: int, dh: int, rank: int, seed: int) -> Tensor:
    return random(heads, d, rank, seed=seed) @ random(heads, rank, dh, seed=seed + 9)


PAIRS = {
    "plain": (random(4, 96, 16), random(4, 96, 16, seed=1)),
    "grouped": (random(6, 96, 16), random(2, 96, 16, seed=1)),
    "one_key_head": (random(4, 96, 16), random(1, 96, 16, seed=1)),
    "bfloat16": (random(4, 96, 16).bfloat16(), random(2, 96, 16, seed=1).bfloat16()),
    "head_larger_than_model": (random(2, 5, 16), random(2, 5, 16, seed=1)),
    "cross": (random(2, 64, 8), random(2, 40, 8, seed=1)),
    "singular": (singular(2, 64, 16, 3, 0), singular(2, 64, 16, 2, 1)),
    "small_scale": (random(2, 64, 16) * 1e-18, random(2, 64, 16, seed=1) * 1e-18),
}


@pytest.mark.parametrize(("w_q", "w_k"), PAIRS.values(), ids=PAIRS.keys())
def test_sigma_qk_is_right_and_on_the_upper_side(w_q: Tensor, w_k: Tensor) -> None:
    want = naive_sigma_qk(w_q, w_k)
    got = sigma_qk(w_q, w_k).double()
    assert (got >= want).all()
    assert (got <= want * (1 + 3e-6)).all()


@pytest.mark.parametrize(("w_q", "w_k"), PAIRS.values(), ids=PAIRS.keys())
def test_sigma_qk_bound_is_certified_and_close(w_q: Tensor, w_k: Tensor) -> None:
    want = naive_sigma_qk(w_q, w_k)
    got = bound(w_q, w_k).double()
    assert (got >= want).all()
    assert (got <= want * 16 ** (1 / 256) * (1 + 1e-3)).all()


@pytest.mark.parametrize("function", [sigma_qk, bound])
def test_sigma_qk_far_below_the_product_of_the_norms(function: Function) -> None:
    # W_Q and W_K share no direction of the head but a faint one.
    w_q, w_k = torch.zeros(1, 32, 8), torch.zeros(1, 32, 8)
    w_q[0, :, :4], w_k[0, :, 4:] = random(32, 4), random(32, 4, seed=1)
    w_k[0, :, 0] = 1e-3
    want, norms = naive_sigma_qk(w_q, w_k).item(), (true_norm(w_q) * true_norm(w_k)).item()
    got = function(w_q, w_k).item()
    assert want <= got
    assert got <= (want + 5e-3 * norms if function is bound else want * (1 + 1e-5))


def test_sigma_qk_bound_holds_where_the_factorisation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "_JITTER", 0.0)
    w_q, w_k = random(1, 20, 4), random(1, 20, 4, seed=1)
    w_q[..., 0] = 0
    A = w_q[0].mT @ w_q[0]
    assert torch.linalg.cholesky_ex(A)[1] > 0
    assert naive_sigma_qk(w_q, w_k).item() <= bound(w_q, w_k).item()
    assert bound(w_q, w_k).item() <= 1.001 * float(true_norm(w_q) * true_norm(w_k))


@pytest.mark.parametrize("function", [sigma_qk, bound])
def test_sigma_qk_of_degenerate_weights(function: Function) -> None:
    w_q, w_k = random(4, 20, 6), random(2, 20, 6, seed=1)
    w_q[0, 3, 3] = math.inf
    w_q[1] = 0
    got = function(w_q, w_k)
    assert got[0].isnan()
    assert got[1] == 0
    assert got[2:].isfinite().all()
    w_k[1, 0, 0] = math.nan
    assert function(w_q, w_k).isnan().tolist() == [True, False, True, True]

"""Leading singular values and spectra from few passes, against whole decompositions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import joint_spectrum, leading_singular_value, update_spectrum
from entropy_monitor.measures.krylov import block_lanczos, gram_product
from entropy_monitor.measures.update_spectrum import trace_function_by_quadrature
from tests.measures.cases import random, true_norm


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(random(n, n))[0]


def true_entropy(w: Tensor) -> float:
    p = torch.linalg.svdvals(w.double()).square()
    return float(torch.special.entr(p / p.sum()).sum())


MATRICES = {
    "random": random(300, 300),
    "tall": random(400, 100),
    "wide": random(100, 400),
    "transposed": random(200, 300).t(),
    "bfloat16": random(150, 150).bfloat16(),
    "rank_one": random(150, 1) @ random(1, 130, seed=1),
    "low_rank": random(150, 3) @ random(3, 130, seed=1),
    "orthogonal": orthogonal(128),
    "small": random(7, 3),
    "column": random(200, 1),
    "tiny": random(150, 150) * 1e-12,
    "cut": random(700, 900),  # more than one block of rows
}


@pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES.keys())
def test_a_first_value_is_right_from_below(w: Tensor) -> None:
    sigma, vectors = leading_singular_value(w)
    want = true_norm(w).item()
    assert want * (1 - 1e-3) <= sigma.item() <= want * (1 + 2e-6)
    again, _ = leading_singular_value(w, vectors)
    assert want * (1 - 1e-3) <= again.item() <= want * (1 + 2e-6)
    gram = vectors.mT @ vectors
    torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


def test_a_value_is_followed_through_a_training() -> None:
    w = random(256, 256) / 16
    _, vectors = leading_singular_value(w)
    for step in range(8):  # new directions come up, and the old ones pass
        w = w + 0.2 * random(256, 1, seed=2 * step) @ random(1, 256, seed=2 * step + 1) / 256**0.5
        sigma, vectors = leading_singular_value(w, vectors)
        assert sigma.item() == pytest.approx(true_norm(w).item(), rel=1e-3)


@pytest.mark.parametrize("n", [256, 1040])  # weights that are passed over twice, and once
def test_what_comes_up_apart_from_the_vectors_that_are_followed_is_found(n: int) -> None:
    size = n // 8
    blocks = [random(size, size, seed=i) / size**0.5 for i in range(8)]
    blocks[0] *= 2
    vectors, errors = None, []
    for look in range(10):
        w = torch.block_diag(*blocks)
        sigma, vectors = leading_singular_value(w, vectors, look)
        errors.append(1 - sigma.item() / max(true_norm(b).item() for b in blocks))
        blocks[5] *= 1.3 if look < 6 else 1.0
    assert max(errors[-3:]) < 1e-3
    assert sum(e > 0.01 for e in errors) <= 3
    assert min(errors) > -1e-5


@pytest.mark.parametrize("n", [1, 5, 6, 12, 19, 24, 32, 33, 48, 64])
def test_small_weights_are_followed_too(n: int) -> None:
    vectors = None
    for look in range(3):
        w = random(n, n, seed=look)  # others at each look
        sigma, vectors = leading_singular_value(w, vectors, look)
        assert sigma.item() == pytest.approx(true_norm(w).item(), rel=1e-2 if n > 32 else 2e-6)


@pytest.mark.parametrize("n", [256, 1040])
def test_a_spike_that_outgrows_the_others_is_followed(n: int) -> None:
    first, second = (
        torch.nn.functional.normalize(random(n, 1, seed=i), dim=0)
        @ torch.nn.functional.normalize(random(1, n, seed=i + 1), dim=1)
        for i in (1, 3)
    )
    base = random(n, n) / n**0.5 + 6 * first
    vectors, size = None, 4.0
    for look in range(12):
        w = base + size * second
        sigma, vectors = leading_singular_value(w, vectors, look)
        assert sigma.item() == pytest.approx(torch.linalg.matrix_norm(w, 2).item(), rel=0.03)
        size *= 1.1


def test_a_start_of_another_shape_is_no_start() -> None:
    w = random(80, 90)
    _, other = leading_singular_value(random(50, 40))
    assert torch.equal(leading_singular_value(w, other)[0], leading_singular_value(w)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_known(value: float) -> None:
    w = random(100, 100)
    w[3, 5] = value
    sigma, vectors = leading_singular_value(w)
    assert sigma.isnan()
    assert leading_singular_value(w, vectors)[0].isnan()
    assert vectors.isfinite().all()
    spectrum = update_spectrum(w)
    assert spectrum.sigma.isnan()
    assert spectrum.entropy.isnan()
    assert update_spectrum(w[:10]).entropy.isnan()


def test_zeros() -> None:
    for w in (torch.zeros(100, 100), torch.zeros(3, 5), torch.zeros(0, 5)):
        assert leading_singular_value(w)[0] == 0
        assert update_spectrum(w).sigma == 0
        assert update_spectrum(w).entropy.isnan()


def test_the_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    w = torch.ones(80, 80)
    first = leading_singular_value(w)[0], *update_spectrum(w)
    torch.manual_seed(5)
    second = leading_singular_value(w)[0], *update_spectrum(w)
    torch.set_rng_state(state)
    leading_singular_value(w), update_spectrum(w)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("w", MATRICES.values(), ids=MATRICES.keys())
def test_a_pass_is_the_product_with_the_gram_matrix(w: Tensor) -> None:
    x = random(w.shape[1], 4, seed=3)
    want = w.double().mT @ (w.double() @ x.double())
    got = gram_product(w, x).double()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_a_space_that_ends_early_does_not_exaggerate() -> None:
    w = random(90, 2) @ random(2, 90, seed=1)
    block = torch.linalg.qr(random(90, 4, seed=2)).Q
    _, _, projected = block_lanczos(w, block, 4)
    assert torch.linalg.eigvalsh(projected.double())[-1] <= true_norm(w) ** 2 * (1 + 1e-5)


# Errors of the estimate in nats and of σ, relative: what the docstring states, with a margin.
SPECTRA = {
    "random": (random(300, 300), 0.1, 0.08),
    "grouped keys": (random(100, 300), 0.1, 0.08),
    "signs": (torch.sign(random(300, 2) @ random(2, 300, seed=1) + 2 * random(300, 300, seed=2)), 0.08, 1e-3),
    "rank_one": (MATRICES["rank_one"], 1e-3, 1e-5),
    "low_rank": (MATRICES["low_rank"], 1e-3, 1e-5),
    "rank_twenty": (random(150, 20) @ random(20, 150, seed=1), 0.06, 1e-3),
    "orthogonal": (orthogonal(128), 1e-3, 1e-5),
    "steep": (orthogonal(200) * torch.arange(1, 201).float() ** -1.0, 0.08, 1e-5),
    "bfloat16": ((random(150, 1) @ random(1, 150, seed=1)).bfloat16(), 0.01, 1e-4),
    "exact": (random(64, 300), 2e-5, 1e-5),
    "exact and small": (random(5, 8) * 1e-8, 2e-5, 1e-5),
}


@pytest.mark.parametrize(("w", "nats", "rel"), SPECTRA.values(), ids=SPECTRA.keys())
def test_the_spectrum_of_an_update(w: Tensor, nats: float, rel: float) -> None:
    got = update_spectrum(w)
    assert got.entropy.item() == pytest.approx(true_entropy(w), abs=nats)
    want = true_norm(w).item()
    assert want * (1 - rel) <= got.sigma.item() <= want * (1 + 1e-5)
    assert got.norm.item() == pytest.approx(float(w.double().norm()), rel=1e-5)


def test_several_updates_count_as_one_spectrum() -> None:
    updates = [random(40, 40), 3 * random(20, 40, seed=1), torch.zeros(8, 8)]
    values = torch.cat([torch.linalg.svdvals(u.double()) for u in updates]).square()
    got = joint_spectrum([update_spectrum(u) for u in updates])
    assert got.entropy.item() == pytest.approx(
        float(torch.special.entr(values / values.sum()).sum()), rel=1e-5
    )
    assert got.sigma.item() == pytest.approx(float(values.max().sqrt()), rel=1e-5)
    assert joint_spectrum([update_spectrum(torch.zeros(8, 8))] * 2).entropy.isnan()


@pytest.mark.parametrize("rank", [3, 40])
def test_the_quadrature_that_needs_no_eigenvalues(rank: int) -> None:
    m = random(40, rank).double()
    m = m @ m.mT / m.square().sum()
    values, vectors = torch.linalg.eigh(m)
    want = (vectors.square() @ torch.xlogy(values.clamp(min=0), values.clamp(min=0)))[:16]
    torch.testing.assert_close(trace_function_by_quadrature(m.float(), 16).double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [leading_singular_value, update_spectrum])
def test_what_is_no_matrix_is_refused(function: object) -> None:
    for w in (torch.ones(3), torch.ones(2, 2).int(), torch.ones(2, 3, 3)):
        with pytest.raises(ConfigurationError, match=r"floating matrix \[m, n\]"):
            function(w)  # type: ignore[operator]

"""The top singular vectors against the whole decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures.singular import top_singular_vectors


def matrices() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    basis = torch.linalg.qr(draw(400, 400)).Q
    return {
        "small": draw(12, 7),
        "wide": draw(3, 900),
        "random": draw(400, 600),
        "tall": draw(700, 300) * 1e-3,
        "rank one": torch.outer(draw(500), draw(300)),
        "identity": torch.eye(300, dtype=torch.float64),
        "two equal": basis @ torch.diag(torch.cat([torch.tensor([5.0, 5.0]), torch.ones(398)]).double()),
        "steep": basis @ torch.diag(torch.logspace(0, -12, 400, dtype=torch.float64)) @ basis.t(),
        "one": torch.full((1, 1), -3.0, dtype=torch.float64),
        "huge": draw(40, 50) * 1e30,
        "tiny": draw(40, 50) * 1e-30,
    }


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_agrees_with_the_whole_decomposition(name: str, dtype: torch.dtype) -> None:
    w = matrices()[name].to(dtype)
    u, sigma, v = top_singular_vectors(w)
    exact = torch.linalg.svdvals(w.double())[0]
    rel = 1e-6 if dtype == torch.float32 else 1e-13
    assert sigma.item() == pytest.approx(exact.item(), rel=rel)
    assert u.norm().item() == pytest.approx(1, rel=1e-5)
    assert v.norm().item() == pytest.approx(1, rel=1e-5)
    near = 1e-5 if dtype == torch.float32 else 1e-11
    w, u, sigma, v = (x.double() for x in (w, u, sigma, v))
    assert (w @ v - sigma * u).norm() <= near * sigma
    assert (w.t() @ u - sigma * v).norm() <= near * sigma
    assert v[v.abs().argmax()] > 0


def test_it_draws_nothing_and_repeats_to_the_bit() -> None:
    w = matrices()["random"].float()
    state = torch.get_rng_state()
    first, second = top_singular_vectors(w), top_singular_vectors(w)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_zero_matrix_has_unit_vectors() -> None:
    u, sigma, v = top_singular_vectors(torch.zeros(300, 400))
    assert sigma == 0
    assert u.norm().item() == pytest.approx(1)
    assert v.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("w", [torch.ones(3), torch.ones(2, 2).int(), torch.ones(0, 3)])
def test_what_is_no_matrix_is_refused(w: Tensor) -> None:
    with pytest.raises(ConfigurationError, match="floating matrix"):
        top_singular_vectors(w)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="NaN or infinity"):
        top_singular_vectors(torch.tensor([[1.0, torch.nan]]))

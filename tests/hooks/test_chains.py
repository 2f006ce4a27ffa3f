"""Projections that several linear maps make: low-rank chains, adapters by hand, heads put together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.hooks.test_projections_agree import HD, B, D, H, T, parts_of


def split(y: Tensor) -> Tensor:
    return y.unflatten(-1, (H, HD)).transpose(1, 2)


class Attention(nn.Module):
    """Keys and values by plain maps; queries by the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(D, D), nn.Linear(D, D)

    def queries(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.queries(x), split(self.k(x)), split(self.v(x)))


class OwnLinear(nn.Module):
    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n) / n**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class OwnAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.a, self.b = nn.Parameter(torch.randn(4, D) / 8), nn.Parameter(torch.randn(D, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.a.T @ self.b.T) * 0.5


class Adapted(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.q = OwnAdapter()

    def queries(self, x: Tensor) -> Tensor:
        return split(self.q(x))

    def expected(self) -> Tensor:
        return self.q.linear.weight + 0.5 * self.q.b @ self.q.a


class Latent(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = OwnLinear(D, 10), OwnLinear(10, D), nn.RMSNorm(10)

    def queries(self, x: Tensor) -> Tensor:
        return split(self.b(self.norm(self.a(x))))

    def expected(self) -> Tensor:
        return self.b.weight @ self.a.weight


class Joined(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, H * 3), nn.Linear(D, H * (HD - 3))

    def queries(self, x: Tensor) -> Tensor:
        parts = [y(x).unflatten(-1, (H, -1)) for y in (self.first, self.second)]
        return torch.cat(parts, -1).transpose(1, 2)

    def expected(self) -> Tensor:
        return torch.cat([y.weight.view(H, -1, D) for y in (self.first, self.second)], 1).flatten(0, 1)


class Bent(Latent):
    def queries(self, x: Tensor) -> Tensor:
        return split(self.b(F.gelu(self.a(x))))


class Positions(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.p, self.positions = nn.Linear(D, D), nn.Linear(D, D), nn.Parameter(torch.randn(T, D))

    def queries(self, x: Tensor) -> Tensor:
        return split(self.q(x) + self.p(self.positions.expand_as(x)))


class Embedding(nn.Module):
    """The map that makes the attention's input is not part of a projection, in the same module or not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(2 * D, D), nn.LayerNorm(D)
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        return F.scaled_dot_product_attention(split(self.q(x)), split(self.k(x)), split(x))


def sigmas(weight: Tensor) -> list[float]:
    return torch.linalg.matrix_norm(weight.detach().double().reshape(H, HD, -1), 2).tolist()


@pytest.mark.parametrize("kind", [Adapted, Latent, Joined])
def test_they_count_as_one(kind: type[Attention]) -> None:
    torch.manual_seed(0)
    model = kind()
    parts, figures = parts_of(model, torch.randn(B, T, D))
    assert parts.reasons == {}
    assert figures["sigma_q"] == pytest.approx(sigmas(model.expected()), rel=1e-5)
    assert figures["sigma_k"] == pytest.approx(sigmas(model.k.weight), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Bent, "the second map of a low-rank chain"), (Positions, "two linear maps of different inputs")],
)
def test_or_are_unknown(kind: type[Attention], reason: str) -> None:
    torch.manual_seed(0)
    model = kind()
    parts, figures = parts_of(model, torch.randn(B, T, D))
    assert all(v != v for v in figures["sigma_q"])
    assert reason in parts.reasons["query"]
    assert figures["sigma_k"] == pytest.approx(sigmas(model.k.weight), rel=1e-5)


def test_what_makes_the_input_of_both_is_no_part_of_them() -> None:
    torch.manual_seed(0)
    model = Embedding()
    parts, figures = parts_of(model, torch.randn(B, T, 2 * D))
    assert parts.reasons == {}
    assert figures["sigma_q"] == pytest.approx(sigmas(model.q.weight), rel=1e-5)
    assert figures["sigma_k"] == pytest.approx(sigmas(model.k.weight), rel=1e-5)

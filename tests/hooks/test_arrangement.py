"""Heads are found wherever a model put them, or the layer is left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em
from entropy_monitor.hooks.arrangement import Arrangement

B, N, H, D = 3, 6, 4, 8


class Attention(nn.Module):
    """Attends over q and k as `fold` lays them out; `unfold` gives maps as `[B, H, T, S]`."""

    def __init__(self, fold: Callable[[Tensor], Tensor], unfold: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fold, self.unfold = fold, unfold
        self.seen: list[Tensor] = []  # `measure` puts attributes back, not what is inside them
        self.q, self.k = nn.Linear(H * D, H * D), nn.Linear(H * D, H * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.fold(self.q(x)), self.fold(self.k(x))
        maps = self.attend(q, k)
        self.seen.append(torch.special.entr(self.unfold(maps).double()).sum(-1).mean((0, 2)))
        return maps

    def attend(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("...id,...jd->...ij", q, k).softmax(-1)


class Flattened(Attention):
    def attend(self, q: Tensor, k: Tensor) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2)) / D**0.5
        shape = scores.shape
        scores = scores.reshape(-1, shape[-1])
        scores[:, 4:] = -1e9
        return F.softmax(scores.reshape(shape), dim=-1)


def heads_inside(x: Tensor) -> Tensor:
    return x.view(B, -1, H, D).transpose(1, 2).reshape(B * H, -1, D)


def heads_outside(x: Tensor) -> Tensor:
    return x.view(B, -1, H, D).permute(2, 0, 1, 3).reshape(H * B, -1, D)


def inside(maps: Tensor) -> Tensor:
    return maps.unflatten(0, (B, H))


def outside(maps: Tensor) -> Tensor:
    return maps.unflatten(0, (H, B)).transpose(0, 1)


def windows(fold: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: fold(x).unflatten(1, (3, 2))


def unwindowed(unfold: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda maps: unfold(maps).transpose(1, 2).flatten(0, 1)


def normed(fold: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    weight = torch.linspace(0.5, 2.0, D)
    return lambda x: F.rms_norm(fold(x), (D,)) * weight


FOLDS: dict[str, Callable[[], Attention]] = {
    "(b h)": lambda: Attention(heads_inside, inside),
    "(h b)": lambda: Attention(heads_outside, outside),
    "(b h) windows": lambda: Attention(windows(heads_inside), unwindowed(inside)),
    "(h b) windows": lambda: Attention(windows(heads_outside), unwindowed(outside)),
    "(h b) direction": lambda: Attention(lambda x: F.normalize(heads_outside(x), dim=-1) * 3, outside),
    "(b h) normed": lambda: Attention(normed(heads_inside), inside),
    "(h b) normed": lambda: Attention(normed(heads_outside), outside),
    "masked as a matrix": lambda: Flattened(heads_inside, inside),
    "masked as a matrix, (h b)": lambda: Flattened(heads_outside, outside),
}


@pytest.mark.parametrize("name", FOLDS)
def test_entropies_of_folded_heads(name: str) -> None:
    torch.manual_seed(0)
    model = FOLDS[name]()
    table = em.measure(model, 2 * torch.randn(B, N, H * D))
    got = torch.tensor(table.entropy.to_numpy(), dtype=torch.float64)
    assert torch.allclose(got, model.seen[-1], atol=1e-5), f"{got} instead of {model.seen[-1]}"
    want = torch.linalg.matrix_norm(model.q.weight.view(H, D, -1), 2).detach()
    assert torch.allclose(torch.tensor(table.sigma_q.to_numpy(), dtype=torch.float32), want, rtol=1e-4)


def test_heads_in_the_middle_are_not_guessed() -> None:
    def across(x: Tensor) -> Tensor:  # (b h) (f n) d -> (b h n) f d
        return heads_inside(x).unflatten(1, (2, 3)).transpose(1, 2).reshape(B * H * 3, 2, D)

    model = Attention(across, lambda maps: maps[:, None])
    with pytest.raises(
        em.AttentionNotFoundError, match=r"shape \[36, 2, 8\] hold 4 heads .* Keep heads in a dim"
    ):
        em.measure(model, torch.randn(B, N, H * D))


def test_sequence_first_with_as_many_sequences_as_tokens() -> None:
    def fold(x: Tensor) -> Tensor:  # t b (h d) -> (b h) t d, as a copy
        return (x * 0.5).contiguous().view(5, 5 * H, D).transpose(0, 1)

    torch.manual_seed(0)
    model = Attention(fold, lambda maps: maps.unflatten(0, (5, H)))
    table = em.measure(model, 2 * torch.randn(5, 5, H * D))
    assert torch.allclose(torch.tensor(table.entropy.to_numpy()).double(), model.seen[-1], atol=1e-5)


def test_one_sequence_needs_no_order() -> None:
    model = Attention(
        lambda x: x.view(N, H, D).transpose(0, 1).contiguous().sinh(), lambda maps: maps.unsqueeze(0)
    )
    table = em.measure(model, torch.randn(1, N, H * D))
    assert torch.allclose(torch.tensor(table.entropy.to_numpy()).double(), model.seen[-1], atol=1e-5)


@pytest.mark.parametrize("heads_outside", [False, True])
def test_folded_heads_beside_windows(heads_outside: bool) -> None:
    plain = torch.randn(B, 3, H, 2, D)  # sequences, windows, heads
    folded = plain.permute(*((2, 0) if heads_outside else (0, 2)), 1, 3, 4).flatten(0, 1)
    found = Arrangement((), (), folded=H, heads_outside=heads_outside).apply(folded)
    assert torch.equal(found, plain.flatten(0, 1))

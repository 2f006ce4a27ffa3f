"""Operands, every kind of mask, and matrices: what several tests here start from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

B, H, Hk, Tq, Tk, D = 2, 4, 2, 6, 9, 8


def operands(
    heads: int = H, key_heads: int = Hk, rows: int = Tq, keys: int = Tk, spread: float = 2.0
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    q = torch.randn(B, heads, rows, D, generator=g) * spread
    return q, torch.randn(B, key_heads, keys, D, generator=g)


def pick(*shape: int, seed: int = 3) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.4


def additive(seen: Tensor, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, value)


def with_a_blind_row() -> Tensor:
    seen = pick(B, 1, Tq, Tk)
    seen[1, 0, 2] = False
    return seen


LOWEST = torch.finfo(torch.float32).min
MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "bool_2d": lambda: pick(Tq, Tk),
    "bool_3d": lambda: pick(H, Tq, Tk),
    "bool_4d_padding": lambda: pick(B, 1, 1, Tk),
    "bool_per_row": lambda: pick(B, H, Tq, 1),
    "bool_blind_row": with_a_blind_row,
    "minus_inf": lambda: additive(with_a_blind_row(), -math.inf),
    "minus_1e9": lambda: additive(with_a_blind_row(), -1e9),
    "lowest": lambda: additive(with_a_blind_row(), LOWEST),
    "lowest_twice": lambda: additive(with_a_blind_row(), LOWEST) + additive(pick(Tq, Tk, seed=5), LOWEST),
    "lowest_bfloat16": lambda: additive(pick(B, 1, Tq, Tk), torch.finfo(torch.bfloat16).min, torch.bfloat16),
    "minus_1e4": lambda: additive(with_a_blind_row(), -1e4),
    "window_minus_100": lambda: additive(pick(B, 1, Tq, Tk), -100.0),
    "biases": lambda: torch.randn(H, Tq, Tk, generator=torch.Generator().manual_seed(1)),
    "biases_and_hidden": lambda: torch.randn(
        B, H, Tq, Tk, generator=torch.Generator().manual_seed(1)
    ).masked_fill(~pick(Tq, Tk), -math.inf),
}


def true_norm(w: Tensor) -> Tensor:
    return torch.linalg.svdvals(w.double())[..., 0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

"""What a table and maps must say, from dense float64 logits: written out, and from nothing of ours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import entropy_monitor as em
from entropy_monitor import measures

B, T, H, K, D = 2, 11, 4, 2, 8
WIDTH = H * D


class Projected(nn.Module):
    """q, k and v projections of one input, `[B, T, H, D]` and `[B, T, K, D]`; attention is a subclass's."""

    def __init__(self, key_heads: int = H) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, key_heads * D) for _ in range(2))
        with torch.no_grad():
            self.q.weight.mul_(4)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(f(x).unflatten(-1, (-1, D)) for f in (self.q, self.k, self.v))  # type: ignore[return-value]

    def products(self, x: Tensor, scale: float = D**-0.5) -> Tensor:
        """`[B, H, T, T]`, float64."""
        q, k, _ = (y.detach().double().transpose(1, 2) for y in self.qkv(x))
        return q @ k.repeat_interleave(H // k.shape[1], dim=1).transpose(-1, -2) * scale

    def sigma_qk(self) -> Tensor:
        heads = self.k.weight.shape[0] // D
        w_q = self.q.weight.detach().double().view(H, D, WIDTH)
        w_k = self.k.weight.detach().double().view(heads, D, WIDTH).repeat_interleave(H // heads, dim=0)
        return torch.linalg.matrix_norm(w_k.transpose(1, 2) @ w_q, 2)


def figures(logits: Tensor, maps: Tensor | None = None, rows: Tensor | None = None) -> dict[str, Tensor]:
    """Columns of each head, from logits `[B, H, T, S]`, -inf where hidden; and from maps if no softmax."""
    u = logits.double()
    if rows is not None:
        u = u[:, :, rows]
        maps = None if maps is None else maps[:, :, rows]
    n = (u > -math.inf).sum(-1)
    p = u.masked_fill((n == 0)[..., None], 0.0).softmax(-1) if maps is None else maps.double()
    valid = (n > 0) if maps is None else (n > 0) & (p.sum(-1) > 0)
    count = valid.sum((0, 2))

    def mean(x: Tensor) -> Tensor:
        return torch.where(valid, x, 0.0).sum((0, 2)) / count

    return {
        "entropy": mean(torch.special.entr(p).sum(-1)),
        "max_entropy": mean(n.clamp(min=1).double().log()),
        "max_logit": u.amax((0, 2, 3)),
        "rows_read": count.double(),
    }


def check(table: Any, want: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    for name, figure in want.items():
        got = torch.from_numpy(np.asarray(table[name])).double()
        torch.testing.assert_close(
            got, figure, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def check_model(
    model: nn.Module,
    inputs: tuple[Any, ...],
    logits: Tensor,
    maps: Tensor | None = None,
    attention: str = "softmax",
    layer: str | None = None,
) -> Any:
    """All rows, some rows and maps of a model with one attention call; the table with all rows."""
    out = model(*inputs)
    table = em.measure(model, *inputs, rows="all")
    assert len(table) == H
    assert set(table["attention"]) == {attention}
    check(table, figures(logits, maps))
    some = em.measure(model, *inputs, rows=4)
    rows = measures.stratified_rows(logits.shape[2], 4, 0)
    check(some, figures(logits, maps, rows))
    with em.capture(model, rows="all", maps=True) as seen:
        watched = model(*inputs)
    assert torch.equal(out, watched)
    ((kept,),) = seen.maps.values()
    want = maps if maps is not None else logits.softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(kept.double(), want.double(), rtol=1e-4, atol=1e-5)
    return table

"""Norms of every row's centred logits at a cost linear in the number of tokens, without the logits.

With `P = Σ_j (k_j - mean k)(k_j - mean k)ᵀ` over the keys that a row sees, `‖u - mean u‖₂² = scale² qᵀ P q`.
Under a causal mask P grows with the row: it is kept at the borders of chunks of rows, and the keys of a
row's own chunk are added from their logits, merged as Chan, Golub & LeVeque (1983) merge variances. All
terms are sums of squares: nothing cancels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.measures._precision import matmul

CHUNK = 128
"""Rows in a chunk: a row has this many logits as temporaries, a key head a D × D matrix for every chunk."""


def logit_norms(q: Tensor, keys: Tensor, seen: Tensor | None, *, is_causal: bool) -> Tensor:
    """Upper bounds of `‖u_i - mean(u_i)‖₂` of all rows.

    They lie above it by an allowance for rounding: by 1e-4 of it where the row's query points along the keys
    as much as a random one does, by up to 2e-3 of `‖q_i‖ max_j ‖k_j‖ √n_i` where it is orthogonal to all.

    Args:
        q: `[B, H, Tq, D]`, float32 or float64, times the scale.
        keys: `[B, Hk, Tk, D]` in q's dtype, centred, 0 where no row sees them.
        seen: `[B, 1, Tk]` in q's dtype, 1 for keys that are seen and 0 for those that are hidden from all
            rows; None where all are seen.
        is_causal: row i sees keys 0 … i of these.

    Returns:
        `[B, H, Tq]`; under a causal mask 0 for rows that see one key or none.
    """
    squares = _causal(q, keys, seen) if is_causal else _all_seen(q, keys)
    return squares.sqrt() * (1 + 4 * torch.finfo(q.dtype).eps)  # and their sums and root themselves


def _all_seen(q: Tensor, keys: Tensor) -> Tensor:
    B, H, T, D = q.shape
    scatter = matmul(keys.mT, keys)
    grouped = q.reshape(B, keys.shape[1], -1, D)
    return _raised(_quadratic(grouped, scatter), grouped, _trace(scatter)[..., None]).view(B, H, T)


def _causal(q: Tensor, keys: Tensor, seen: Tensor | None) -> Tensor:
    B, H, T, D = q.shape
    Hk = keys.shape[1]
    L = CHUNK
    C = -(-T // L)
    keys = keys[:, :, : C * L]
    seen = keys.new_ones(1, 1, keys.shape[2]) if seen is None else seen[..., : C * L]
    missing = C * L - keys.shape[2]
    keys = F.pad(keys, (0, 0, 0, missing)).view(B, Hk, C, L, D)
    seen = F.pad(seen, (0, missing)).view(-1, 1, C, L)

    count = seen.sum(-1)
    mean = keys.sum(-2) / count.clamp(min=1)[..., None]
    around = (keys - mean[..., None, :]) * seen[..., None]
    # A product with ones in place of cumsum, which PyTorch refuses on CUDA where it is asked for determinism.
    before = torch.ones(C, C, dtype=q.dtype, device=q.device).tril(-1)
    earlier = matmul(count, before.mT)
    earlier_mean = matmul(before, mean * count[..., None]) / earlier.clamp(min=1)[..., None]
    step = mean - earlier_mean
    weight = earlier * count / (earlier + count).clamp(min=1)
    grown = matmul(around.mT, around) + weight[..., None, None] * step[..., :, None] * step[..., None, :]
    scatter = matmul(before, grown.flatten(-2)).view(B, Hk, C, D, D)

    group = H // Hk
    rows = F.pad(q, (0, 0, 0, C * L - T)).view(B, Hk, group, C, L, D).transpose(2, 3)
    flat = rows.reshape(B, Hk, C, group * L, D)
    logits = matmul(flat, around.mT).view(B, Hk, C, group, L, L)
    own = torch.ones(L, L, dtype=q.dtype, device=q.device).tril() * seen[..., None, :]  # [B or 1, 1, C, L, L]
    own_count = own.sum(-1)[:, :, :, None]
    own = own[:, :, :, None]
    own_mean = (logits * own).sum(-1) / own_count.clamp(min=1)
    own_squares = ((logits - own_mean[..., None]) * own).square().sum(-1)
    apart = own_mean + matmul(flat, step[..., None]).view(B, Hk, C, group, L)
    number = earlier[..., None, None]
    merged = number * own_count / (number + own_count).clamp(min=1) * apart.square()

    squares = _quadratic(flat, scatter).view_as(own_squares) + own_squares + merged
    reach = _trace(scatter)[..., None] + (own[:, :, :, 0] * around.square().sum(-1)[..., None, :]).sum(-1)
    reach = reach + torch.minimum(number, own_count)[..., 0, :] * step.square().sum(-1)[..., None]
    reach = reach[:, :, :, None].expand(B, Hk, C, group, L).reshape(B, Hk, C, -1)
    squares = _raised(squares.view(B, Hk, C, -1), flat, reach).view(B, Hk, C, group, L)
    squares = torch.where(number + own_count > 1, squares, 0.0)
    return squares.transpose(2, 3).reshape(B, H, C * L)[..., :T]


def _quadratic(rows: Tensor, scatter: Tensor) -> Tensor:
    """`qᵀ P q`, `[..., n]`, of rows `[..., n, D]` and P `[..., D, D]`."""
    return (matmul(rows, scatter) * rows).sum(-1).clamp(min=0)


def _trace(scatter: Tensor) -> Tensor:
    return scatter.diagonal(dim1=-2, dim2=-1).sum(-1)


def _raised(squares: Tensor, rows: Tensor, trace: Tensor) -> Tensor:
    """Squares lifted over the rounding of sums of D or of a chunk's length, each at most `‖q‖² tr P`."""
    gamma = 2 * math.sqrt(max(rows.shape[-1], CHUNK)) * torch.finfo(rows.dtype).eps
    return squares + gamma * rows.square().sum(-1) * trace

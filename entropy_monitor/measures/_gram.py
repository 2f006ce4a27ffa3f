"""Gram matrices of scaled matrices, and powers of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_monitor.measures._precision import MAX_BYTES, matmul, working_dtype

_TEMPORARIES = 4  # copies of a matrix, live at once while its Gram is made


def scaled(w: Tensor) -> tuple[Tensor, Tensor]:
    """Bring the largest entry of every matrix to 1, so that no product over- or underflows.

    Args:
        w: `[..., m, n]`.

    Returns:
        The scaled matrices in the working dtype, zeros for those that are not finite, and the
        factors `[...]` to multiply results with: 0 for zero or empty matrices, NaN for those that
        are not finite.
    """
    w = w.to(working_dtype(w))
    if 0 in w.shape[-2:]:
        return w, w.new_zeros(w.shape[:-2])
    largest = torch.linalg.vector_norm(w, ord=math.inf, dim=(-2, -1))  # NaN and inf come through
    finite = largest.isfinite()
    usable = finite & (largest > 0)
    divisor = torch.where(usable, largest, 1.0)[..., None, None]
    cleaned = torch.where(usable[..., None, None], w, 0.0) / divisor
    return cleaned, torch.where(finite, largest, math.nan)


def grams(w: Tensor, *, of_columns: bool | None = None, max_bytes: int = MAX_BYTES) -> tuple[Tensor, Tensor]:
    """Gram matrices of scaled matrices, a few matrices at a time.

    Args:
        w: `[..., m, n]`.
        of_columns: True for WᵀW, False for WWᵀ, None for the smaller of them.
        max_bytes: limit for temporaries; a single matrix is never cut.

    Returns:
        The Gram matrices and the factors that `scaled` took out of w.
    """
    sizes = list(w.shape[:-2])
    if w.numel() * _TEMPORARIES * working_dtype(w).itemsize > max_bytes and max(sizes, default=1) > 1:
        dim = sizes.index(max(sizes))
        halves = [grams(half, of_columns=of_columns, max_bytes=max_bytes) for half in w.chunk(2, dim)]
        return torch.cat([g for g, _ in halves], dim), torch.cat([f for _, f in halves], dim)
    s, factor = scaled(w)
    if of_columns is None:
        of_columns = w.shape[-1] <= w.shape[-2]
    return (matmul(s.mT, s) if of_columns else matmul(s, s.mT)), factor


def power_bound(G: Tensor, squarings: int) -> Tensor:
    """`‖G^(2^k)‖_F^(1/2^k)` of symmetric positive semi-definite G: at least its top eigenvalue.

    Every power is divided by its norm before it is squared, and the logarithms of the norms are
    summed: `log λ ≤ Σ_j 2^(-j) log f_j`.
    """
    if G.shape[-1] == 0:
        return G.new_zeros(G.shape[:-2])
    log_bound = G.new_zeros(G.shape[:-2])
    for j in range(squarings + 1):
        norm = torch.linalg.matrix_norm(G)
        log_bound = log_bound + norm.log() * 2.0**-j
        if j < squarings:
            G = G / torch.where(norm > 0, norm, 1.0)[..., None, None]
            G = matmul(G, G)
    return log_bound.exp()

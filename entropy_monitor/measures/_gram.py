"""Gram matrices of scaled matrices, and powers of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_monitor.measures._precision import working_dtype


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


def gram(w: Tensor) -> Tensor:
    """The smaller of WᵀW and WWᵀ, `[..., min(m, n), min(m, n)]`."""
    return w.mT @ w if w.shape[-1] <= w.shape[-2] else w @ w.mT


def power_bound(G: Tensor, squarings: int) -> Tensor:
    """`‖G^(2^k)‖_F^(1/2^k)` of symmetric positive semi-definite matrices: at least the largest eigenvalue.

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
            G = G @ G
    return log_bound.exp()

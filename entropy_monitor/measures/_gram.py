"""Gram matrices of scaled matrices, and powers of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_monitor.measures._precision import MAX_BYTES, matmul, on_host, working_dtype

_SAFE_TRACE = (1e-16, 1e30)  # of a Gram matrix none of whose products over- or underflowed to any effect
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


def unit_grams(w: Tensor) -> tuple[Tensor, Tensor]:
    """`WᵀW` of every matrix, of trace 1, and the factors that were taken out of W.

    Args:
        w: `[N, m, n]`, any floating dtype and strides.

    Returns:
        `[N, n, n]` and `[N]`: zeros for matrices that are zero (factor 0) or not finite (factor NaN).
    """
    if on_host(w) and 0 not in w.shape:
        G = _plain_grams(w)
        trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
        if bool(((trace > _SAFE_TRACE[0]) & (trace < _SAFE_TRACE[1])).all()):
            return G / trace[..., None, None], trace.sqrt()
    # On an accelerator one may not look; scaling first is a pass over memory that is fast there.
    G, factor = grams(w, of_columns=True)
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    divisor = torch.where(trace > 0, trace, 1.0)
    return G / divisor[..., None, None], factor * divisor.sqrt()


def _plain_grams(w: Tensor) -> Tensor:
    dtype = working_dtype(w)
    if w.dtype == dtype:
        return matmul(w.mT, w)
    count = max(1, MAX_BYTES // (4 * w[0].numel() * dtype.itemsize))
    return torch.cat([matmul(part.mT, part) for part in (p.to(dtype) for p in torch.split(w, count))])


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

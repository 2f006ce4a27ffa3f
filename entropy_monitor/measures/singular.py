"""The largest singular value of a matrix with its vectors, found the same way every time."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures._gram import scaled
from entropy_monitor.measures._precision import exact, matmul

_BLOCK = 8  # vectors that are followed together: the top one need not stand apart from the next
_DEPTH = 6  # powers of WᵀW in one Krylov space
_RESTARTS = 40
_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}  # of ‖Wᵀu - σv‖ / σ; σ errs by its square
_NEAR = {torch.float32: 1e-4, torch.float64: 1e-9}
_DENSE = 256  # up to this smaller side the whole decomposition costs less


@torch.no_grad()
def top_singular_vectors(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value of a matrix, and its left and right vectors.

    A block Krylov iteration (Musco & Musco 2015), restarted until it has converged; small matrices are
    decomposed as a whole. It begins from the same vectors every time and leaves the global random state
    alone. Waits for the device on accelerators.

    Args:
        w: `[m, n]`, any floating dtype; computed in float32, float64 for float64.

    Returns:
        u `[m]`, σ (0-dim) and v `[n]`: `W v = σ u`, `Wᵀ u = σ v`, norms 1, the largest entry of v positive.
        For a zero matrix σ is 0 and u, v are any unit vectors.

    Raises:
        ConfigurationError: if w is not a matrix with entries, or not finite.
    """
    if w.dim() != 2 or not w.is_floating_point() or w.numel() == 0:
        raise ConfigurationError(
            f"a floating matrix [m, n] with entries is needed, got {w.dtype} of shape {tuple(w.shape)}"
        )
    with exact(w.device):
        a, factor = scaled(w)
        if not torch.isfinite(factor):
            raise ConfigurationError(f"a matrix of shape {tuple(w.shape)} holds NaN or infinity")
        if factor == 0:
            return _start(a.shape[0], 1, a)[:, 0], factor, _start(a.shape[1], 1, a)[:, 0]
        u, sigma, v = _dense(a) if min(a.shape) <= _DENSE else _krylov(a)
        sign = torch.where(v[v.abs().argmax()] < 0, -1.0, 1.0)
        return u * sign, factor * sigma, v * sign


def _dense(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    return u[:, 0].contiguous(), s[0], vt[0].contiguous()


def _krylov(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    block = _start(a.shape[1], _BLOCK, a)
    last = torch.inf
    for _ in range(_RESTARTS):
        powers = [block]
        for _ in range(_DEPTH):
            powers.append(torch.linalg.qr(matmul(a.t(), matmul(a, powers[-1]))).Q)
        basis = torch.linalg.qr(torch.cat(powers, dim=1)).Q
        u, s, wt = torch.linalg.svd(matmul(a, basis), full_matrices=False)
        block = matmul(basis, wt[:_BLOCK].t())
        sigma, left, right = s[0], u[:, 0], block[:, 0]
        residual = float(torch.linalg.vector_norm(torch.mv(a.t(), left) - sigma * right) / sigma)
        if residual <= _TOLERANCE[a.dtype] or (residual < _NEAR[a.dtype] and residual > last / 2):
            break  # or at what rounding allows
        last = residual
    return left.contiguous(), sigma, right.contiguous()


def _start(n: int, count: int, like: Tensor) -> Tensor:
    """Orthonormal columns `[n, count]` in general position, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(n, min(n, count), generator=generator, dtype=torch.float64)
    columns: Tensor = torch.linalg.qr(draws).Q.to(like)
    return columns

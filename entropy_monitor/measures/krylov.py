"""Block Krylov spaces of WᵀW: leading singular values and spectra from few passes over a matrix.

Blocks of vectors meet a matrix a cache-full of rows at a time, both products while these are there, so that
a pass costs one reading of it and no copy, whatever its dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_monitor.measures._precision import MAX_BYTES, matmul, working_dtype
from entropy_monitor.measures._top_eigenvalue import top_eigenvalue

_CACHE = 2**19  # bytes of a block of rows on a CPU: a quarter of a core's second-level cache


def starting_vectors(n: int, count: int, like: Tensor, seed: int = 0) -> Tensor:
    """Gaussian columns `[n, count]`, the same every time for a seed, of like's working dtype and device.

    They are drawn on the device and from a generator of their own: nothing is copied there, and the global
    random state is left alone.
    """
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(n, count, generator=generator, dtype=working_dtype(like), device=like.device)


def rows_contiguous(w: Tensor) -> Tensor:
    """w, or its transpose (of the same singular values) where that is how it lies in memory."""
    return w.t() if w.stride(0) == 1 and w.stride(1) > 1 else w


def gram_product(w: Tensor, x: Tensor) -> Tensor:
    """`Wᵀ W x`.

    Args:
        w: `[m, n]`, any floating dtype.
        x: `[n, r]`, float32 or float64.

    Returns:
        `[n, r]`, of x's dtype.
    """
    room = _CACHE if w.device.type == "cpu" else MAX_BYTES
    result: Tensor | None = None
    for rows in torch.split(w, max(1, room // max(1, w.shape[1] * x.dtype.itemsize))):
        part = rows.to(x.dtype)
        product = matmul(matmul(part, x).mT, part)  # this way round both run along the rows
        result = product if result is None else result.add_(product)
    return x.new_zeros(x.shape) if result is None else result.mT


def block_lanczos(
    w: Tensor, block: Tensor, depth: int, tolerance: float | None = None, at_least: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis Q of `span(X, WᵀW X, …, (WᵀW)^(depth-1) X)`, `WᵀW Q` and `Qᵀ WᵀW Q`.

    Golub and Underwood's block Lanczos with full orthogonalisation, in `depth` passes over W. Where the space
    ends early, some columns of Q are shorter than 1; eigenvalues of the projection do not exceed those of
    WᵀW all the same.

    Args:
        w: `[m, n]`, any floating dtype.
        block: X `[n, r]`, orthonormal; float32 or float64.
        depth: from 1.
        tolerance: stop before where the residual of the top Ritz pair is below this share of its value. It
            waits for accelerators.
        at_least: passes before that.

    Returns:
        Q and its images `[n, q]`, and the projection `[q, q]`, q = depth · r or less.
    """
    basis, images = block, gram_product(w, block)
    for passes in range(1, depth):
        last = images[:, -block.shape[1] :]
        rest = last - matmul(basis, matmul(basis.mT, last))
        if tolerance is not None and passes >= at_least and _is_settled(basis, images, rest, tolerance):
            break
        rest = torch.linalg.qr(rest).Q
        # Once more: what is left where the space ends is rounding, along the basis as much as off it.
        block = rest - matmul(basis, matmul(basis.mT, rest))
        basis = torch.cat([basis, block], dim=1)
        images = torch.cat([images, gram_product(w, block)], dim=1)
    return basis, images, _projected(basis, images)


def leading_directions(projected: Tensor, count: int) -> Tensor:
    """Columns near the leading eigenvectors of a projection; powers of it find them on accelerators.

    Args:
        projected: `[q, q]`, symmetric, positive semi-definite.
        count: r, at most q.

    Returns:
        `[q, r]`, orthonormal.
    """
    if projected.device.type == "cpu":
        vectors: Tensor = torch.linalg.eigh(projected).eigenvectors[:, -count:].flip(1)
        return vectors
    for _ in range(6):
        largest = projected.abs().amax()
        projected = projected / torch.where(largest > 0, largest, 1.0)
        projected = matmul(projected, projected)
    columns: Tensor = torch.linalg.qr(matmul(projected, starting_vectors(len(projected), count, projected))).Q
    return columns


def largest_ritz_value(projected: Tensor) -> Tensor:
    """Top eigenvalue of a small projection, 0-dim; without a wait on accelerators, from above by 0.3 %."""
    if projected.device.type == "cpu":
        finite = bool(projected.isfinite().all())
        return torch.linalg.eigvalsh(projected)[-1].clamp(min=0) if finite else projected.sum() * torch.nan
    return top_eigenvalue(projected[None])[0]


def _projected(basis: Tensor, images: Tensor) -> Tensor:
    projected = matmul(basis.mT, images)
    return (projected + projected.mT) / 2


def _is_settled(basis: Tensor, images: Tensor, rest: Tensor, tolerance: float) -> bool:
    """Whether the top Ritz pair is an eigenpair, up to a tolerance, or there is none to be had."""
    projected = _projected(basis, images)
    scale = projected.abs().amax()
    if not bool((scale > 0) & scale.isfinite()):
        return True
    values, vectors = torch.linalg.eigh(projected / scale)  # whose squares stay in range
    residual = torch.linalg.vector_norm(matmul(rest / scale, vectors[-rest.shape[1] :, -1:]))
    return bool(residual <= tolerance * values[-1])

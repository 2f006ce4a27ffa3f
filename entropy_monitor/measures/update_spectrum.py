"""Spectral norm and spectral entropy of an update, from a few passes over it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures._precision import exact, matmul, working_dtype
from entropy_monitor.measures.krylov import (
    block_lanczos,
    gram_product,
    largest_ritz_value,
    rows_contiguous,
    starting_vectors,
)

_WHOLE = 64  # up to this smaller side all singular values are found
_LEADING = 8  # directions that are followed one by one
_PROBES = 8  # directions that stand for all others
_DEPTH = 2  # powers of the Gram matrix that follow them
_NODES = 28  # of the quadrature for λ log λ, 1 apart in log u, around 0


class UpdateSpectrum(NamedTuple):
    """What `update_spectrum` finds, 0-dim each.

    Attributes:
        sigma: the largest singular value.
        norm: Frobenius norm, `(Σ s²)^½`.
        entropy: `-Σ p log p` in nats, `p = s² / Σ s²`; NaN for a zero matrix.
    """

    sigma: Tensor
    norm: Tensor
    entropy: Tensor


@torch.no_grad()
def update_spectrum(delta: Tensor) -> UpdateSpectrum:
    """The largest singular value and the spectral entropy of an update of a weight.

    Up to 64 rows or columns it is exact (to 1e-5). Beyond, eight leading directions of `G = ΔᵀΔ` are found by
    one pass and followed, and eight random ones, orthogonal to them, stand for the rest: block Lanczos of
    depth 2 gives `G log G` on both (stochastic Lanczos quadrature, Ubaru, Chen & Saad 2017; deflated as in
    Hutch++, Meyer et al. 2021), and the rest counts by the energy that is left, which is known exactly.
    Three passes over Δ, the same vectors every time.

    Errors of the estimates, measured on updates of a Vision Transformer (width 128 and 384): entropies by
    0.03 nats rms and 0.08 at most with AdamW, 0.001 and 0.01 with SGD; σ by 1e-6. Over 20 draws each:
    Gaussian matrices, which have no leading directions, by 0.06 nats rms and 0.10 at most (of 5); of rank 20
    by 0.02 and 0.05; of rank 3 and orthogonal ones not at all. Matrices of up to 1024 rows whose singular
    values fall geometrically, or that are 0 but for one entry in a thousand, by up to 0.27 nats (of 4 to 6).
    Where nothing stands apart σ is from below by up to 7.6 %. Waits for no accelerator.

    Args:
        delta: `[m, n]`, any floating dtype and strides.

    Returns:
        float32 (float64 for float64); NaN where delta is not finite. Entries below 1e-19 count as 0.

    Raises:
        ConfigurationError: if delta is not a floating matrix of two dimensions.
    """
    if delta.dim() != 2 or not delta.is_floating_point():
        raise ConfigurationError(
            f"a floating matrix [m, n] is needed, got {delta.dtype} of shape {tuple(delta.shape)}"
        )
    m, n = delta.shape  # random directions should not fall where there is nothing
    w = rows_contiguous(delta) if m == n else delta if m > n else delta.t()
    dtype = working_dtype(w)
    with exact(w.device):
        norm = torch.linalg.vector_norm(w, dtype=dtype)
        if min(w.shape) <= _WHOLE:
            small = w.to(dtype) / torch.where(norm > 0, norm, 1.0)
            gram = matmul(small.mT, small) if w.shape[0] >= w.shape[1] else matmul(small, small.mT)
            shares = _trace_function(gram, len(gram)) if len(gram) else gram.new_zeros(0)
            entropy = -shares.sum()
            sigma = norm * largest_ritz_value(gram).sqrt() if len(gram) else norm
        else:
            sigma, entropy = _estimates(w, norm)
        entropy = torch.where(norm > 0, entropy.clamp(0, math.log(max(1, min(w.shape)))), torch.nan)
        return UpdateSpectrum(torch.where(norm.isfinite(), sigma, torch.nan), norm, entropy)


def joint_spectrum(spectra: list[UpdateSpectrum]) -> UpdateSpectrum:
    """The spectrum of all singular values of several matrices together, by the chain rule of entropy."""
    sigma, norms, entropies = (torch.stack(values) for values in zip(*spectra, strict=True))
    largest = norms.amax()
    shares = (norms / largest).square()
    shares = shares / shares.sum()  # 0 / 0 where all are zero
    within = torch.where(shares == 0, 0.0, shares * entropies).sum()
    norm = largest * torch.linalg.vector_norm(norms / torch.where(largest > 0, largest, 1.0))
    return UpdateSpectrum(sigma.amax(), norm, within + torch.special.entr(shares).sum())


def _estimates(w: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """σ and entropy of a large matrix by the block Lanczos iteration."""
    scale = torch.where(norm > 0, norm, 1.0)
    energy = scale.square()
    draws = starting_vectors(w.shape[1], _LEADING + _PROBES, w)
    leading = gram_product(w, draws[:, :_LEADING]) / energy
    # Householder's Q takes the columns in order: first the leading ones' span, then what is orthogonal to it.
    block = torch.linalg.qr(torch.cat([leading, draws[:, _LEADING:]], dim=1)).Q
    _, _, projected = block_lanczos(w, block, _DEPTH)
    projected = projected / energy  # eigenvalues are p now
    values = _trace_function(projected, _LEADING + _PROBES)
    energies = projected.diagonal()[: _LEADING + _PROBES]
    left = (1 - energies[:_LEADING].sum()).clamp(min=0)
    probed = energies[_LEADING:].sum()
    # Where the probes see nothing there is nothing but rounding left.
    rest = torch.where(probed > 0, values[_LEADING:].sum() / probed, 0.0)
    entropy = -(values[:_LEADING].sum() + left * rest)
    return scale * largest_ritz_value(projected).sqrt(), entropy


def _trace_function(projected: Tensor, count: int) -> Tensor:
    """The first diagonal elements of `M log M`, M positive semi-definite with eigenvalues up to 1; `[count]`.

    Eigenvalues would be waited for on accelerators. There it is
    `λ log λ = -∫ λ (1-λ) / ((1+u) (λ+u)) u dx, u = eˣ`, whose trapezoidal sum converges geometrically, from
    Cholesky factors of M + u.
    """
    if projected.device.type == "cpu":
        if not bool(projected.isfinite().all()):
            return projected.diagonal()[:count] * torch.nan
        values, vectors = torch.linalg.eigh(projected)
        values = values.clamp(min=0)
        return matmul(vectors[:count].square(), torch.xlogy(values, values)[:, None])[:, 0]
    return trace_function_by_quadrature(projected, count)


def trace_function_by_quadrature(projected: Tensor, count: int) -> Tensor:
    """See `_trace_function`; 1e-5 off."""
    x = torch.arange(_NODES, dtype=projected.dtype, device=projected.device) - (_NODES - 1) / 2
    u = x.exp()[:, None, None]
    eye = torch.eye(len(projected), dtype=projected.dtype, device=projected.device)
    factors, _ = torch.linalg.cholesky_ex(projected + u * eye)
    resolvents = torch.cholesky_solve(eye[:, :count].expand(_NODES, -1, -1), factors)
    numerator = (matmul(projected, projected) - projected)[:, :count]
    return ((numerator * resolvents).sum(-2) * (u / (1 + u))[..., 0]).sum(0)

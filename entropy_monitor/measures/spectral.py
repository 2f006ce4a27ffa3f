"""Spectral norms of weights and activations, exact or as upper bounds that need no device wait.

Matrices are `[..., m, n]`. Everything is computed in float32 (float64 for float64 inputs), whatever
autocast says, without gradients. A matrix that holds NaN or inf has norm NaN; nothing raises for
it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures._gram import grams, power_bound
from entropy_monitor.measures._precision import exact, matmul, working_dtype

_SQUARINGS = 6
_ONE_BY_ONE = 1024  # numbers that a product may sum without blocks
_JITTER = 4.0  # roundings of a Gram matrix, in units of eps · trace


def spectral_norm(w: Tensor) -> Tensor:
    """Largest singular value, from the eigenvalues of the smaller Gram matrix.

    Relative error below 1e-5 in float32, kept to the upper side: the result is not below the true
    norm. Waits for the device on accelerators; `spectral_norm_bound` does not.

    Args:
        w: `[..., m, n]`, any floating dtype.

    Returns:
        `[...]`; 0 for a zero or empty matrix, NaN where w is not finite.

    Raises:
        ConfigurationError: if w is not a floating matrix.
    """
    return spectrum(w)[0]


@torch.no_grad()
def spectral_norm_bound(w: Tensor, squarings: int = _SQUARINGS) -> Tensor:
    """Certified upper bound on the largest singular value, without waiting for the device.

    `‖w‖₂ ≤ ‖G^(2^k)‖_F^(1/2^(k+1))`, G the smaller Gram matrix. It overstates by a factor of at
    most `r^(1/2^(k+2))`, r the rank: with the default k = 6 by 1.6 % at rank 64, 2.8 % at 1024.
    Repeated squaring of a normalised matrix: no iteration that could stop early, no wait for the
    device.

    Args:
        w: `[..., m, n]`, any floating dtype.
        squarings: k, from 0.

    Returns:
        `[...]`; 0 for a zero or empty matrix, NaN where w is not finite.

    Raises:
        ConfigurationError: if w is not a floating matrix or squarings is negative.
    """
    require_matrix(w)
    if squarings < 0:
        raise ConfigurationError(f"squarings must be 0 or more, got {squarings}")
    with exact(w.device):
        g, factor = grams(w)
        norm: Tensor = factor * power_bound(g, squarings).sqrt() * safety(w)
        return norm


@torch.no_grad()
def sigma_qk(w_q: Tensor, w_k: Tensor) -> Tensor:
    """`σ_QK = ‖W_K,g(h) W_Q,hᵀ‖₂` of every query head, from Grams of the head size (Theorem 3.1).

    With `A = W_QᵀW_Q = LLᵀ` and `B = W_KᵀW_K`, σ_QK² is the largest eigenvalue of AB, which is that
    of the symmetric `LᵀBL`. Neither scale nor biases nor rotary embeddings are in it. Computed in float64,
    where the device has it; waits for an accelerator. `head_norms` takes less time, and does not wait.

    Args:
        w_q: `[H, d_model, d_head]`, any floating dtype.
        w_k: `[Hk, d_model, d_head]`, Hk a divisor of H: head h uses key head `h // (H // Hk)`. Its
            d_model may differ.

    Returns:
        `[H]`; NaN for heads whose weights are not finite.

    Raises:
        ConfigurationError: if the shapes do not fit.
    """
    require_heads(w_q, w_k)
    dtype = working_dtype(w_q, w_k)
    with exact(w_q.device):
        if w_q.device.type != "mps":
            w_q, w_k = w_q.double(), w_k.double()
        A, factor_q = grams(w_q, of_columns=True)
        B, factor_k = grams(w_k, of_columns=True)
        group = w_q.shape[0] // w_k.shape[0]
        B, factor_k = B.repeat_interleave(group, dim=0), factor_k.repeat_interleave(group, dim=0)
        top = _product_top(A, B)
        norm = factor_q * factor_k * top.sqrt() * safety(w_q)
        # Rounding to float32 must not undo the upper side.
        return (norm * (1 + torch.finfo(dtype).eps)).to(dtype)


def spectral_entropy(w: Tensor) -> Tensor:
    """Entropy `-Σ p_i log p_i` in nats of `p_i = s_i² / Σ_j s_j²`, s the singular values.

    0 for rank one, log min(m, n) when all singular values are equal. Waits for the device on
    accelerators.

    Args:
        w: `[..., m, n]`, any floating dtype.

    Returns:
        `[...]`; NaN for a zero or empty matrix and where w is not finite.

    Raises:
        ConfigurationError: if w is not a floating matrix.
    """
    return spectrum(w)[1]


@torch.no_grad()
def spectrum(w: Tensor) -> tuple[Tensor, Tensor]:
    """`spectral_norm` and `spectral_entropy` at the cost of one of them; waits for an accelerator.

    Args:
        w: `[..., m, n]`, any floating dtype.

    Returns:
        Norm and entropy (nats), `[...]` each.

    Raises:
        ConfigurationError: if w is not a floating matrix.
    """
    require_matrix(w)
    with exact(w.device):
        g, factor = grams(w)
        if g.shape[-1] == 0:
            return factor, torch.full_like(factor, math.nan)
        values = torch.linalg.eigvalsh(g).clamp(min=0)
        p = values / values.sum(-1, keepdim=True)  # 0 / 0 for a zero matrix
        norm = factor * values[..., -1].sqrt() * safety(w)
        return norm, torch.special.entr(p).sum(-1) + 0 * factor


@torch.no_grad()
def update_spectral_norm_bound(mean: Tensor, std: Tensor) -> Tensor:
    """Lower bound on the spectral norm of the ideal Adam update (Proposition 3.2).

    For `Δ = E[g] / √E[g²]`: `σ(Δ)² ≥ ‖Δ‖_F² / min(m, n)` with
    `Δ_ij² = μ² / (μ² + n²) = 1 - n² / (μ² + n²)`, hence `√max(m, n) · √(1 - mean(n² / (μ² + n²)))`;
    for w × w this is the paper's `√w · √(1 - (1/w²) Σ …)`.

    Args:
        mean: μ, expected gradient, `[..., m, n]`.
        std: n, standard deviation of its noise, of the same shape.

    Returns:
        `[...]`. An entry with μ = n = 0 is not updated and counts as 0.

    Raises:
        ConfigurationError: if the two are not floating matrices of one shape.
    """
    require_matrix(mean)
    if mean.shape != std.shape:
        raise ConfigurationError(
            f"mean and std must have one shape, got {tuple(mean.shape)} and {tuple(std.shape)}"
        )
    dtype = working_dtype(mean, std)
    mu, n = mean.to(dtype).abs(), std.to(dtype).abs()
    # The ratio first: squares of small gradients underflow.
    share = torch.where((mu == 0) & (n == 0), 0.0, 1 / (1 + (n / mu).square()))
    return (max(mean.shape[-2:]) * share.mean((-2, -1))).sqrt()


def _product_top(A: Tensor, B: Tensor) -> Tensor:
    """Largest eigenvalue of AB; A, B symmetric, positive semi-definite, possibly singular."""
    if A.shape[-1] == 0:
        return A.new_zeros(A.shape[:-2])
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    top: Tensor = torch.linalg.eigvalsh(matmul(matmul(root.mT, B), root))[..., -1].clamp(min=0)
    return top


def shifted(G: Tensor) -> Tensor:
    """Gram matrices raised by more than their rounding: upper bounds stay such, and Cholesky succeeds."""
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    shift = _JITTER * torch.finfo(G.dtype).eps * trace
    return G + shift[..., None, None] * torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)


def safety(w: Tensor) -> float:
    """Factor above 1 that lifts a norm over the rounding of its Gram matrix.

    The root of a sum of K equal squares, which all round the same way, was seen to err by K eps / 17 where
    they are summed one by one, as in products with a single vector and up to K = 1024, and by less than √K
    eps where they are summed in blocks. That of numbers that differ errs by far less.
    """
    dtype = working_dtype(w)
    inner = max(4, *w.shape[-2:])
    one_by_one: int = inner if min(w.shape[-2:]) == 1 else min(inner, _ONE_BY_ONE)
    return 1 + (one_by_one / 16 + math.sqrt(inner)) * torch.finfo(dtype).eps


def require_matrix(w: Tensor) -> None:
    """Raise unless w is floating `[..., m, n]`."""
    if w.dim() < 2 or not w.dtype.is_floating_point:
        raise ConfigurationError(
            f"a floating matrix [..., m, n] is needed, got {w.dtype} of shape {tuple(w.shape)}"
        )


def require_heads(w_q: Tensor, w_k: Tensor) -> None:
    """Raise unless these are `[H, d_model, d_head]` and `[Hk, d_model, d_head]`, Hk a divisor of H."""
    shapes = f"got {tuple(w_q.shape)} and {tuple(w_k.shape)}"
    if w_q.dim() != 3 or w_k.dim() != 3 or w_q.shape[-1] != w_k.shape[-1]:
        raise ConfigurationError(f"w_q and w_k must be [heads, d_model, d_head] with one d_head, {shapes}")
    if w_k.shape[0] == 0 or w_q.shape[0] % w_k.shape[0]:
        raise ConfigurationError(
            f"the number of query heads must be a multiple of the number of key heads, {shapes}"
        )

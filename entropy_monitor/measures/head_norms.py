"""Spectral norms of every head's projections from one Gram matrix a head, on the upper side."""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_monitor.measures._gram import unit_grams
from entropy_monitor.measures._precision import exact, matmul, working_dtype
from entropy_monitor.measures._top_eigenvalue import top_eigenvalue
from entropy_monitor.measures.spectral import require_heads, require_matrix, safety, shifted


@torch.no_grad()
def head_norm(w: Tensor) -> Tensor:
    """`‖W_h‖₂` of every head, never below it and above it by 0.25 % at most (d_head ≤ 256).

    Typically within 2e-5. Does not wait for accelerators.

    Args:
        w: `[H, d_model, d_head]`, any floating dtype and strides.

    Returns:
        `[H]`, float32 (float64 for float64); 0 for zero weights, NaN for heads that are not finite.

    Raises:
        ConfigurationError: if w is not a floating matrix.
    """
    require_matrix(w)
    with exact(w.device):
        G, factor = unit_grams(w)
        return factor * top_eigenvalue(G).sqrt() * safety(w)


@torch.no_grad()
def head_norms(w_q: Tensor, w_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`‖W_Q,h‖₂`, `‖W_K,g(h)‖₂` and `σ_QK = ‖W_K,g(h) W_Q,hᵀ‖₂` of every query head (Theorem 3.1).

    As `spectral_norm` and `sigma_qk`, at a fraction of their time: one Gram matrix a head, in float32, and
    squarings of matrices of the head's size. With `A = W_QᵀW_Q = LLᵀ` and `B = W_KᵀW_K`, σ_QK² is the top
    eigenvalue of `LᵀBL`. All three are never below the norms; norms are above by 0.25 % at most
    (d_head ≤ 256), typically by 2e-5. σ_QK stands above by as much, and by up to 1e-3 of
    `‖W_Q‖ ‖W_K‖` (6.5e-4 seen), which matters where the two hardly share a direction. Does not wait for
    accelerators.

    Args:
        w_q: `[H, d_model, d_head]`, any floating dtype and strides.
        w_k: `[Hk, d_model, d_head]`, Hk a divisor of H: head h uses key head `h // (H // Hk)`. Its d_model
            may differ.

    Returns:
        `[H]` each, float32 (float64 where one of the two is); NaN for heads that are not finite.

    Raises:
        ConfigurationError: if the shapes do not fit.
    """
    require_heads(w_q, w_k)
    dtype = working_dtype(w_q, w_k)
    heads, keys = w_q.shape[0], w_k.shape[0]
    with exact(w_q.device):
        A, factor_q = unit_grams(w_q.to(dtype) if dtype == torch.float64 else w_q)
        B, factor_k = unit_grams(w_k.to(dtype) if dtype == torch.float64 else w_k)
        shared = shifted(B).repeat_interleave(heads // keys, dim=0)
        L, failed = torch.linalg.cholesky_ex(shifted(A))
        C = matmul(matmul(L.mT, shared), L)
        top_q, top_k, top = torch.split(top_eigenvalue(torch.cat([A, B, C])), [heads, keys, heads])
        top_k, factor_k = (x.repeat_interleave(heads // keys) for x in (top_k, factor_k))
        top = torch.where(failed > 0, top_q * top_k, top)
        sigma_qk = factor_q * factor_k * top.sqrt() * safety(w_q) * safety(w_k)
        return factor_q * top_q.sqrt() * safety(w_q), factor_k * top_k.sqrt() * safety(w_k), sigma_qk


@torch.no_grad()
def bias_norm(w_k: Tensor, b_q: Tensor) -> Tensor:
    """`‖W_K,g(h) b_q,h‖₂` of every query head: how far a query's bias can move its logits for `‖x‖ = 1`.

    Args:
        w_k: `[Hk, d_model, d_head]`, any floating dtype and strides.
        b_q: `[H, d_head]`, Hk a divisor of H.

    Returns:
        `[H]`, float32 (float64 where one of the two is); never below it but for the rounding of products that
        cancel each other, up to a d_model of 16,384.
    """
    require_heads(b_q[:, None], w_k)
    dtype = working_dtype(w_k, b_q)
    with exact(w_k.device):
        # Those that share a key head side by side.
        biases = b_q.to(dtype).reshape(w_k.shape[0], -1, b_q.shape[-1])
        spread = matmul(w_k.to(dtype), biases.mT)
        norms: Tensor = torch.linalg.vector_norm(spread, dim=-2).flatten()
        return norms * safety(w_k)

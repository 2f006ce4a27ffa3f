"""Norms of the activations that enter attention: what the floors of Theorem 3.1 need, at little cost."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures._gram import power_bound, unit_grams
from entropy_monitor.measures._precision import exact, matmul, working_dtype
from entropy_monitor.measures._top_eigenvalue import top_eigenvalue
from entropy_monitor.measures.krylov import starting_vectors
from entropy_monitor.measures.spectral import safety, spectral_norm_bound

_GRAM = 256  # up to this smaller side the Gram matrix is made: it costs as much as that many rows of logits
_FEW = 2**14  # numbers in Gram matrices for which a sharper bound costs next to nothing
_SQUARINGS = 3
_PROBES = 16
_ROUNDS = 3
# The norm of 16 standard normal numbers is below it once in 10^9: P(χ²_16 < t²) ≈ (t²/2)^8 / 8!.
_LEAST = 0.75


@torch.no_grad()
def norm_at_least(x: Tensor) -> Tensor:
    """A lower bound on spectral norms in two passes: the larger of `‖1ᵀX‖₂ / √m` and `‖X‖_F / √min(m, n)`.

    Args:
        x: `[..., m, n]`, any floating dtype.

    Returns:
        `[...]`, float32 (float64 for float64); 0 for empty matrices, NaN where x is not finite.
    """
    m, n = x.shape[-2:]
    dtype = working_dtype(x)
    if 0 in (m, n):
        return x.new_zeros(x.shape[:-2], dtype=dtype)
    x = x.to(dtype).contiguous()  # norms of views cost ten times a copy
    of_mean = torch.linalg.vector_norm(x.sum(-2), dim=-1) / math.sqrt(m)
    frobenius = torch.linalg.vector_norm(x.flatten(-2), dim=-1) / math.sqrt(min(m, n))
    return torch.maximum(of_mean, frobenius)


@torch.no_grad()
def activation_norm(x: Tensor) -> Tensor:
    """Upper bound on the spectral norm of activations, without waiting for the device.

    From the Gram matrix G where its side n is at most 256, as `‖G⁸‖_F^(1/16)`: above by `n^(1/32)` at most
    (14 % for 64) if all singular values are equal, by 2 % for noise, and less where one direction dominates;
    few and small matrices come out to 0.25 %.

    Else from 16 random vectors Ω and `Y = (XᵀX)³ Ω`: with v₁ the first right singular vector
    `‖Y‖₂ ≥ ‖X‖₂⁶ ‖v₁ᵀΩ‖₂`, and the norm of 16 normal numbers is at least 0.75 but for once in 10⁹, so
    `‖X‖₂ ≤ (‖Y‖₂ / 0.75)^(1/6)`: above by a third where one direction dominates, by up to two thirds for
    noise of 1,000 features. The vectors are the same every time, and no random state is touched.

    Numbers below 1e-18 may count as 0.

    Args:
        x: `[..., m, n]`, any floating dtype.

    Returns:
        `[...]`, float32 (float64 for float64); 0 for zero or empty matrices, NaN where x is not finite.

    Raises:
        ConfigurationError: if x is not a floating matrix.
    """
    if x.dim() < 2 or not x.dtype.is_floating_point:
        raise ConfigurationError(
            f"a floating matrix [..., m, n] is needed, got {x.dtype} of shape {tuple(x.shape)}"
        )
    with exact(x.device):
        if min(x.shape[-2:]) <= _GRAM:
            return _by_gram(x)
        x = x.to(working_dtype(x))
        frobenius = torch.linalg.vector_norm(x, dim=(-2, -1))
        scale = torch.where(frobenius > 0, frobenius, 1.0)[..., None, None]
        y = starting_vectors(x.shape[-1], _PROBES, x)
        for _ in range(_ROUNDS):
            y = matmul(x.mT, matmul(x, y) / scale) / scale
        top = spectral_norm_bound(y)
        bound: Tensor = frobenius * (top / _LEAST) ** (1 / (2 * _ROUNDS))
        # Rounding moves small products only; they are at least 0.75 / √n of what they were made from.
        return torch.minimum(bound, frobenius) * (1 + 1e-4)


def _by_gram(x: Tensor) -> Tensor:
    flat = x.flatten(0, -3) if x.dim() > 2 else x[None]
    G, factor = unit_grams(flat if x.shape[-1] <= x.shape[-2] else flat.mT)
    top = top_eigenvalue(G) if G.numel() <= _FEW else power_bound(G, _SQUARINGS)
    norm: Tensor = (factor * top.sqrt() * safety(x)).view(x.shape[:-2])
    return norm

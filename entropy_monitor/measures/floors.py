"""Floors of a row's entropy: Theorem 3.1 applied to norms that bound the row's centred logits.

Every floor is per row; a head's floor is the mean over the same rows as its entropy. Arguments
broadcast against each other: norms of K or X over all keys have a trailing dimension of 1 beside
per-row norms. Norms must be *upper bounds*: an unconverged power iteration overstates the floor. A
norm that is not known is NaN, and so is then the floor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from entropy_monitor.measures._precision import working_dtype
from entropy_monitor.measures.bounds import entropy_lower_bound

ROUNDING_TOLERANCE = 1e-4
"""Nats by which a float32 entropy may lie below a float32 floor through rounding alone.

Up to 131,072 keys, logits rounded at 1e-6 of their norm move B by at most 4e-5 (its slope is at
most (log T)²/4 per unit of relative change in σ), and summing a row adds 1e-5. A mean entropy
further below a mean floor means that what was captured is not what the model computed.
"""

_UPWARDS = 16.0  # roundings between a norm's operands and B, in units of the dtype's eps


@torch.no_grad()
def floor_row(logit_norm: Tensor, num_keys: Tensor) -> Tensor:
    """`B(‖u_i - mean(u_i)‖₂, n_i)` in nats: holds for every softmax attention, and is the tightest.

    Args:
        logit_norm: norm of the row's centred logits over its visible keys.
        num_keys: visible keys n_i.
    """
    return _floor(logit_norm, num_keys)


@torch.no_grad()
def floor_activation(
    scale: Tensor | float, k_norm: Tensor, q_norm: Tensor, bias_norm: Tensor, num_keys: Tensor
) -> Tensor:
    """`B(scale · ‖K‖₂ ‖q_i‖₂ + ‖b_i - mean(b_i)‖₂, n_i)` in nats: holds for dot-product softmax.

    For soft-capped logits too, since the cap only shrinks them.

    Args:
        scale: factor of the product q·k.
        k_norm: spectral norm of the keys of one sequence and head, those that enter the product.
        q_norm: Euclidean norm of the row's query, as it enters the product.
        bias_norm: norm of the row's centred additive biases over its visible keys, 0 without
            biases.
        num_keys: visible keys n_i.
    """
    return _floor(_magnitude(scale) * k_norm * q_norm + bias_norm, num_keys)


@torch.no_grad()
def floor_weights(
    scale: Tensor | float,
    x_kv_norm: Tensor,
    sigma_qk: Tensor,
    x_norm: Tensor,
    query_bias_norm: Tensor | float,
    bias_norm: Tensor,
    num_keys: Tensor,
) -> Tensor:
    """`B(scale · ‖X_kv‖₂ (σ_QK ‖x_i‖₂ + ‖W_K b_q‖₂) + ‖b_i - mean(b_i)‖₂, n_i)` in nats.

    Holds for plain projections without soft-cap: not under rotary embeddings, QK-norm or latent
    projections, where the caller passes NaN for sigma_qk. A bias of the key projection shifts a
    row's logits all alike and cancels.

    Args:
        scale: factor of the product q·k.
        x_kv_norm: spectral norm of the inputs of the key projection, of one sequence.
        sigma_qk: `‖W_K W_Qᵀ‖₂` of the head.
        x_norm: Euclidean norm of the row's input to the query projection.
        query_bias_norm: `‖W_K b_q‖₂` with the query projection's bias, W_K as `[d_model, d_head]`;
            0 without.
        bias_norm: norm of the row's centred additive biases over its visible keys, 0 without
            biases.
        num_keys: visible keys n_i.
    """
    product = _magnitude(scale) * x_kv_norm * (sigma_qk * x_norm + query_bias_norm)
    return _floor(product + bias_norm, num_keys)


@torch.no_grad()
def floor_paper(sigma_qk: Tensor, num_keys: Tensor) -> Tensor:
    """`B(σ_QK, n_i)` in nats: the paper's curve, and no floor.

    It is normalised to `‖X‖₂ ≤ 1` and no scale, so measured entropies may lie below it.

    Args:
        sigma_qk: `‖W_K W_Qᵀ‖₂` of the head.
        num_keys: visible keys n_i.
    """
    return entropy_lower_bound(sigma_qk, num_keys)


def _floor(norm: Tensor, num_keys: Tensor) -> Tensor:
    """B at the norm rounded up, so that rounding lowers a floor and never raises it."""
    dtype = working_dtype(norm, num_keys)
    return entropy_lower_bound(norm.to(dtype) * (1 + _UPWARDS * torch.finfo(dtype).eps), num_keys)


def _magnitude(scale: Tensor | float) -> Tensor | float:
    return scale.abs() if isinstance(scale, Tensor) else abs(scale)

"""The floors of Theorem 3.1 of one attention call, for each row that was read."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.hooks.calls import AttentionCall, Inputs
from entropy_monitor.hooks.head_sigmas import HeadSigmas
from entropy_monitor.measures import RowStatistics

_VACUOUS = 11.0  # B(σ, n) is below 1e-3 nats from σ = log n + 11 on


class Floors(NamedTuple):
    """Nats, `[B, H, R]` or broadcastable to it; NaN where a floor does not hold or is not known."""

    row: Tensor
    activation: Tensor
    weights: Tensor
    paper: Tensor


def floors(
    call: AttentionCall,
    rows: Tensor | None,
    stats: RowStatistics,
    scale: Tensor | None,
    sigmas: HeadSigmas | None,
) -> Floors:
    """The row, activation and weight floors, and the paper's curve.

    On the CPU the activation and the weight floor are given as 0 where they lie below 1e-3 nats for all rows:
    they hold as well, and the spectral norms of keys and inputs, which cost as much as many rows, are not
    needed to know it.

    Args:
        call: the attention call.
        rows: the rows read, `[R]`; None for all.
        stats: of these rows.
        scale: factor of q·k, broadcastable to `[B, H, R]`; None where it is not known.
        sigmas: of the heads' weights; None leaves out all but the row floor.
    """
    n = stats.num_keys
    unknown = torch.full((1, 1, 1), math.nan, dtype=n.dtype, device=n.device)
    if call.weights is not None:  # the theorem is about a softmax
        return Floors(unknown, unknown, unknown, unknown)
    row = measures.floor_row(stats.logit_norm, n)
    if sigmas is None:
        return Floors(row, unknown, unknown, unknown)
    paper = measures.floor_paper(sigmas.sigma_qk[:, None].to(n.device), n)
    if call.inputs is None or scale is None:
        return Floors(row, unknown, unknown, paper)
    activation = _activation_floor(call.inputs, rows, stats, scale)
    if call.inputs.inner is not None:
        return Floors(row, activation, unknown, paper)
    return Floors(row, activation, _weight_floor(call, rows, stats, scale, sigmas, unknown), paper)


def _activation_floor(inputs: Inputs, rows: Tensor | None, stats: RowStatistics, scale: Tensor) -> Tensor:
    group = inputs.q.shape[1] // inputs.k.shape[1]
    q_norm = torch.linalg.vector_norm(_take(inputs.q, rows).to(stats.num_keys.dtype), dim=-1)
    k = inputs.k.contiguous()
    if q_norm.device.type == "cpu":
        least = measures.norm_at_least(k).repeat_interleave(group, dim=1)[..., None]
        if _is_vacuous(scale.abs() * least * q_norm, stats):
            return torch.zeros_like(q_norm)
    k_norm = measures.activation_norm(k).repeat_interleave(group, dim=1)[..., None]
    return measures.floor_activation(scale, k_norm, q_norm, stats.bias_norm, stats.num_keys)


def _weight_floor(
    call: AttentionCall,
    rows: Tensor | None,
    stats: RowStatistics,
    scale: Tensor,
    sigmas: HeadSigmas,
    unknown: Tensor,
) -> Tensor:
    """The floor from weights and inputs; NaN where the projections or their inputs are not known."""
    if call.query is None or call.key is None or call.extra_keys:
        return unknown
    x_q, x_kv = call.query.inputs(), call.key.inputs()
    if x_q is None or x_kv is None:
        return unknown
    n = stats.num_keys
    factor = call.query.factor * call.key.factor
    # After rotary embeddings or norms it does not hold; their norms are not worth computing.
    if (n.device.type == "cpu" or isinstance(factor, float)) and math.isnan(factor):
        return unknown
    x_norm = torch.linalg.vector_norm(_take(x_q, rows, dim=1).to(n.dtype), dim=-1)[:, None]
    scale = scale * factor
    sigma_qk, query_bias = sigmas.sigma_qk[:, None], sigmas.query_bias[:, None]
    if n.device.type == "cpu":
        least = measures.norm_at_least(x_kv)[:, None, None]
        if _is_vacuous(scale.abs() * least * (sigma_qk * x_norm + query_bias), stats):
            return torch.zeros_like(n)
    x_kv_norm = measures.activation_norm(x_kv)[:, None, None]
    return measures.floor_weights(scale, x_kv_norm, sigma_qk, x_norm, query_bias, stats.bias_norm, n)


def _is_vacuous(norm: Tensor, stats: RowStatistics) -> bool:
    """Whether no row has a floor above 1e-3 nats, from what the norms of its logits are at least."""
    keys = float(stats.num_keys.max()) if stats.num_keys.numel() else 0.0
    norm = torch.where(stats.num_keys > 1, norm + stats.bias_norm, math.inf)
    return bool((norm >= math.log(max(keys, 1.0)) + _VACUOUS).all())  # False for NaN


def _take(x: Tensor, rows: Tensor | None, dim: int = 2) -> Tensor:
    return x if rows is None else x.index_select(dim, rows)

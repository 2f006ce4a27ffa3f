"""What the softmax does to each query row: entropy, visible keys, and the floors' norms.

Shapes: B sequences, H query heads, Hk key heads, Tq query rows, Tk keys, R rows read, D head size.
Everything is computed in float32 (float64 for float64 inputs), whatever autocast says, without
gradients. On an accelerator nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import masks
from entropy_monitor.measures._blocks import blocks
from entropy_monitor.measures._logits import (
    HIDDEN,
    TEMPORARIES,
    Block,
    Cover,
    Modify,
    check_operands,
    check_rows,
    logit_blocks,
)
from entropy_monitor.measures._precision import MAX_BYTES, exact, on_host, without_tangents, working_dtype
from entropy_monitor.measures._reduction import Reduction, RowStatistics, without_keys

__all__ = [
    "RowStatistics",
    "attention_entropy",
    "attention_map",
    "entropy_from_maps",
    "row_statistics",
    "row_statistics_from_logits",
    "row_statistics_from_weights",
]

_HUGE = -1e-8 * HIDDEN  # far above any logit that attention is made of, far below what hides


@torch.no_grad()
def row_statistics(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    rows: Tensor | None = None,
    max_bytes: int = MAX_BYTES,
    modify: Modify | None = None,
) -> RowStatistics:
    """Statistics of softmax attention rows, from the queries and keys that enter the product.

    Entropy is `log l - Σ e^t t / l` with `t = u - max u`, `l = Σ e^t`; `log l` is taken as `log1p`
    of what the largest logit leaves, so that rows as sharp as 1e-6 nats keep their digits (Zhai et
    al. 2023, section 3).

    Args:
        q: `[B, H, Tq, D]`, any floating dtype, after rotary embedding and QK-norm.
        k: `[B, Hk, Tk, D]`, Hk a divisor of H: query head h reads key head `h // (H // Hk)`.
        mask: boolean (True = seen) or additive, broadcastable to `[B, H, Tq, Tk]`;
            `measures.hidden` says which values of an additive mask hide a key.
        is_causal: row i sees keys 0 … i, also when Tq ≠ Tk; together with `mask` both apply.
        scale: factor of the product, `D**-0.5` by default.
        softcap: c in `c · tanh(scale · q·k / c)`, taken before the mask is added.
        rows: indices of the query rows to read, `[R]`; all by default. Not checked against Tq.
        max_bytes: limit for temporaries; one row of one head is never cut.
        modify: what else is done to the logits before the mask is added: takes capped logits
            `[b, h, r, Tk]`, which it must not write to, slices of the sequences and of the query
            heads that they are of, and the indices of their rows; returns logits, the same or a new
            tensor, and which keys are hidden (True), broadcastable to them, or None.

    Returns:
        RowStatistics of `[B, H, R]`; `bias_norm` is that of all that was added or modified.

    Raises:
        ConfigurationError: if shapes or dtypes do not fit, or scale or softcap is not usable.
    """
    check_operands(q, k, scale, softcap, rows)
    options: dict[str, Any] = {
        "mask": mask,
        "is_causal": is_causal,
        "scale": scale,
        "softcap": softcap,
        "rows": rows,
        "max_bytes": max_bytes,
        "modify": modify,
    }
    num_rows = q.shape[-2] if rows is None else rows.shape[0]

    def reduced(by_adding: bool) -> RowStatistics:
        reduction = Reduction(q, num_rows, working_dtype(q, k))
        for block in logit_blocks(q, k, **options, by_adding=by_adding):
            reduction.add(block)
        return reduction.result()

    with exact(q.device), without_tangents():
        if not on_host(q) or modify is not None:
            return reduced(by_adding=False)
        stats = reduced(by_adding=True)
        return stats if _hid_enough(stats) else reduced(by_adding=False)


def _hid_enough(stats: RowStatistics) -> bool:
    """Whether sums hid keys: what is not finite may be theirs, and so may what is huge."""
    if not stats.entropy.numel():
        return True
    finite = math.isfinite(stats.entropy.sum() + stats.logit_norm.sum())
    return finite and bool(stats.max_logit.amax() < _HUGE)


@torch.no_grad()
def row_statistics_from_logits(
    logits: Tensor, *, rows: Tensor | None = None, max_bytes: int = MAX_BYTES
) -> RowStatistics:
    """Statistics of softmax rows from the logits themselves, biases and masks already added.

    A key counts as hidden where its logit is -inf, at most -5e8, at most half of the dtype's lowest
    finite value, or within 2 % of -1e4 in a row whose largest logit is above -1e3.

    Args:
        logits: `[B, H, Tq, Tk]` as they enter the softmax, in the dtype in which the mask was
            added.
        rows: indices of the query rows to read, `[R]`; all by default.
        max_bytes: limit for temporaries; one row of one head is never cut.

    Returns:
        RowStatistics of `[B, H, R]`; `bias_norm` is NaN, since logits do not tell their biases.

    Raises:
        ConfigurationError: if the logits are not four-dimensional and floating.
    """
    if logits.dim() != 4 or not logits.dtype.is_floating_point:
        raise ConfigurationError(
            f"logits must be floating [batch, heads, query rows, keys], got {logits.dtype} of shape "
            f"{tuple(logits.shape)}"
        )
    check_rows(rows)
    B, H, Tq, Tk = logits.shape
    dtype = working_dtype(logits)
    row_bytes = max(1, dtype.itemsize * TEMPORARIES * Tk)
    R = Tq if rows is None else rows.shape[0]
    with exact(logits.device), without_tangents():
        reduction = Reduction(logits, R, dtype)
        for place in blocks(B, H, R, group=1, row_bytes=row_bytes, head_bytes=0, max_bytes=max_bytes):
            part = masks.cut(logits, place[0], place[1], place[2] if rows is None else rows[place[2]])
            hidden = masks.hidden_logits(part)
            if on_host(logits) and not hidden.any():
                reduction.add(Block(place, part.to(dtype, copy=True), None, None))
            else:
                values = part.to(dtype).masked_fill(hidden, HIDDEN)
                reduction.add(Block(place, values, Cover(hidden), None))
        out = reduction.result()
    out.bias_norm.fill_(math.nan)
    return out


@torch.no_grad()
def row_statistics_from_weights(
    weights: Tensor, logits: Tensor, *, rows: Tensor | None = None, max_bytes: int = MAX_BYTES
) -> RowStatistics:
    """Statistics of attention rows that no softmax made, such as `relu(q kᵀ) / n`.

    Rows are divided by their sums: entropy is that of what share of a row's weight goes to which key.

    Args:
        weights: `[B, H, Tq, Tk]`, not negative, as they are multiplied with values.
        logits: `[B, H, Tq, Tk]`, what the weights were made from; `hidden_logits` says which keys
            are hidden.
        rows: indices of the query rows to read, `[R]`; all by default.
        max_bytes: limit for temporaries; one row of one head is never cut.

    Returns:
        RowStatistics of `[B, H, R]`. A row whose weights are all 0 attends to nothing: its num_keys
        and entropy are 0, as those of a row that is fully masked. `logit_norm` and `bias_norm` are
        NaN: no floor follows from them.

    Raises:
        ConfigurationError: if shapes differ, or are not four-dimensional and floating.
    """
    if weights.dim() != 4 or weights.shape != logits.shape or not weights.dtype.is_floating_point:
        raise ConfigurationError(
            f"weights must be floating [batch, heads, query rows, keys] as the logits are, got "
            f"{weights.dtype} of shape {tuple(weights.shape)} and {tuple(logits.shape)}"
        )
    check_rows(rows)
    B, H, Tq, Tk = weights.shape
    dtype = working_dtype(weights)
    row_bytes = max(1, dtype.itemsize * TEMPORARIES * Tk)
    R = Tq if rows is None else rows.shape[0]
    out = without_keys(weights, R, dtype)
    for place in blocks(B, H, R, group=1, row_bytes=row_bytes, head_bytes=0, max_bytes=max_bytes):
        chosen = (place[0], place[1], place[2] if rows is None else rows[place[2]])
        u = masks.cut(logits, *chosen)
        hidden = masks.hidden_logits(u)
        w = masks.cut(weights, *chosen).to(dtype)
        total = w.sum(-1, keepdim=True)
        entropy = torch.special.entr(w / torch.where(total == 0, 1.0, total)).sum(-1)
        count = (~hidden).sum(-1, dtype=dtype)
        out.entropy[place] = entropy
        out.num_keys[place] = torch.where(total.squeeze(-1) == 0, 0.0, count)
        if Tk:
            out.max_logit[place] = u.to(dtype).masked_fill(hidden, -math.inf).amax(-1)
    out.logit_norm.fill_(math.nan)
    out.bias_norm.fill_(math.nan)
    return out


def attention_entropy(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    rows: Tensor | None = None,
    max_bytes: int = MAX_BYTES,
) -> Tensor:
    """Entropy of each attention row in nats, `[B, H, R]`; arguments as in `row_statistics`."""
    return row_statistics(
        q,
        k,
        mask=mask,
        is_causal=is_causal,
        scale=scale,
        softcap=softcap,
        rows=rows,
        max_bytes=max_bytes,
    ).entropy


@torch.no_grad()
def attention_map(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    rows: Tensor | None = None,
    max_bytes: int = MAX_BYTES,
    modify: Modify | None = None,
) -> Tensor:
    """Attention probabilities before dropout; arguments as in `row_statistics`.

    Returns:
        `[B, H, R, Tk]`, float32 (float64 for float64 inputs). Rows sum to one; fully masked rows
        are all 0.
    """
    check_operands(q, k, scale, softcap, rows)
    with exact(q.device), without_tangents():
        R = q.shape[-2] if rows is None else rows.shape[0]
        out = q.new_zeros((*q.shape[:2], R, k.shape[-2]), dtype=working_dtype(q, k))
        for block in logit_blocks(
            q,
            k,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            softcap=softcap,
            rows=rows,
            max_bytes=max_bytes,
            modify=modify,
        ):
            b, h, r = block.place
            blind = block.logits.amax(-1, keepdim=True) < HIDDEN / 2 if block.logits.shape[-1] else None
            p = block.logits.softmax(-1)
            out[b, h, r, : p.shape[-1]] = p if blind is None else p * (~blind).to(p.dtype)
    return out


@torch.no_grad()
def entropy_from_maps(maps: Tensor) -> Tensor:
    """Entropy `-Σ_j p_j log p_j` in nats of attention maps, with `0 log 0 = 0`.

    Args:
        maps: `[..., Tq, Tk]`, rows sum to one (before dropout: dropped-out rows do not).

    Returns:
        `[..., Tq]`, float32 (float64 for float64 inputs). NaN where a probability is NaN.
    """
    entropy: Tensor = torch.special.entr(maps.to(working_dtype(maps))).sum(-1)
    return entropy

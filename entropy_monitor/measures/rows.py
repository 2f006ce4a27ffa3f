"""What the softmax does to each query row: entropy, visible keys, and the norms that the floors need.

Shapes: B sequences, H query heads, Hk key heads, Tq query rows, Tk keys, R rows read, D head size.
Everything is computed in float32 (float64 for float64 inputs), whatever autocast says, without
gradients. On an accelerator nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import masks
from entropy_monitor.measures._blocks import blocks
from entropy_monitor.measures._logits import Block, check_rows, logit_blocks
from entropy_monitor.measures._precision import MAX_BYTES, exact, working_dtype

_HIDING_LOGIT = -5e8  # a mask's -1e9 plus any logit that a model could have
_HALF_HIDING_LOGIT = (-1.02e4, -0.98e4)  # a mask's -1e4 plus a logit of usual size
_VISIBLE_LOGIT = -1e3
_TEMPORARIES = 8


class RowStatistics(NamedTuple):
    """Figures of every query row read, each `[B, H, R]`, float32 (float64 for float64 inputs).

    Attributes:
        entropy: `-Σ_j A_ij log A_ij` in nats, before dropout; 0 for fully masked rows, NaN where a
            visible logit is not finite.
        num_keys: number n_i of visible keys; 0 = fully masked.
        max_logit: largest visible logit as the softmax sees it: scaled, capped, biased; -inf when
            fully masked.
        logit_norm: `‖u_i - mean(u_i)‖₂` over the visible keys.
        bias_norm: `‖b_i - mean(b_i)‖₂` of the additive biases over the visible keys; 0 without
            biases, NaN where they are not known.
    """

    entropy: Tensor
    num_keys: Tensor
    max_logit: Tensor
    logit_norm: Tensor
    bias_norm: Tensor


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

    Returns:
        RowStatistics of `[B, H, R]`.

    Raises:
        ConfigurationError: if shapes or dtypes do not fit, or scale or softcap is not usable.
    """
    with exact(q.device):
        out = _allocate(q, rows, working_dtype(q, k))
        for block in logit_blocks(
            q,
            k,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            softcap=softcap,
            rows=rows,
            max_bytes=max_bytes,
        ):
            _store(out, block.place, _reduce(block))
    return out


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
    row_bytes = max(1, dtype.itemsize * _TEMPORARIES * Tk)
    R = Tq if rows is None else rows.shape[0]
    with exact(logits.device):
        out = _allocate(logits, rows, dtype)
        for place in blocks(
            B, H, R, group=1, row_bytes=row_bytes, head_bytes=0, max_bytes=max_bytes
        ):
            part = masks.cut(
                logits, place[0], place[1], place[2] if rows is None else rows[place[2]]
            )
            hidden = _hidden_logits(part)
            values = part.to(dtype).masked_fill(hidden, -math.inf)
            _store(out, place, _reduce(Block(place, values, hidden, None)))
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
) -> Tensor:
    """Attention probabilities before dropout; arguments as in `row_statistics`.

    Returns:
        `[B, H, R, Tk]`, float32 (float64 for float64 inputs). Rows sum to one; fully masked rows
        are all 0.
    """
    with exact(q.device):
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
        ):
            p = block.logits.softmax(-1)
            if block.hidden is not None:
                p.masked_fill_(block.hidden, 0.0)  # a row of hidden keys alone is NaN until here
            b, h, r = block.place
            out[b, h, r] = p
    return out


@torch.no_grad()
def entropy_from_maps(maps: Tensor) -> Tensor:
    """Entropy `-Σ_j p_j log p_j` in nats of attention maps, with `0 log 0 = 0`.

    Args:
        maps: `[..., Tq, Tk]`, rows sum to one (before dropout: dropped-out rows do not).

    Returns:
        `[..., Tq]`, float32 (float64 for float64 inputs). NaN where a probability is NaN.
    """
    return torch.special.entr(maps.to(working_dtype(maps))).sum(-1)


def _allocate(like: Tensor, rows: Tensor | None, dtype: torch.dtype) -> RowStatistics:
    """Output for `[B, H, R]` rows, holding what is true of a row without keys."""
    shape = (*like.shape[:2], like.shape[-2] if rows is None else rows.shape[0])
    fill = (0.0, 0.0, -math.inf, 0.0, 0.0)
    return RowStatistics(*(like.new_full(shape, value, dtype=dtype) for value in fill))


def _store(
    out: RowStatistics, place: tuple[slice, slice, slice], part: tuple[Tensor | None, ...]
) -> None:
    for whole, values in zip(out, part, strict=True):
        if values is not None:
            whole[place] = values


def _hidden_logits(logits: Tensor) -> Tensor:
    low, high = _HALF_HIDING_LOGIT
    limit = max(_HIDING_LOGIT, torch.finfo(logits.dtype).min / 2)
    if logits.shape[-1] == 0:
        return logits <= limit
    seen_elsewhere = logits.amax(-1, keepdim=True) > _VISIBLE_LOGIT
    return (logits <= limit) | ((logits >= low) & (logits <= high) & seen_elsewhere)


def _reduce(block: Block) -> tuple[Tensor | None, ...]:
    """RowStatistics of one block; None where `_allocate` holds the answer. Overwrites the block's logits."""
    logits, hidden = block.logits, block.hidden
    Tk = logits.shape[-1]
    if Tk == 0:
        return (None,) * 5
    max_logit, argmax = logits.max(-1, keepdim=True)
    if hidden is None:
        num_keys = torch.full_like(max_logit, Tk)
        t = logits.sub_(max_logit)
    else:
        num_keys = (~hidden).sum(-1, keepdim=True, dtype=logits.dtype)
        if hidden.shape[-1] == 1:
            num_keys = num_keys * Tk
        num_keys = num_keys.expand_as(max_logit)
        t = logits.sub_(max_logit).masked_fill_(hidden, 0.0)
    e = t.exp()
    if hidden is not None:
        e.masked_fill_(hidden, 0.0)
    weighted = (e * t).sum(-1, keepdim=True)
    # l = 1 + rest: adding the 1 first would round away all digits of a rest below 1e-7.
    rest = e.scatter_(-1, argmax, 0.0).sum(-1, keepdim=True)
    entropy = rest.log1p() - weighted / (1 + rest)

    n = num_keys.clamp(min=1)
    mean = t.sum(-1, keepdim=True) / n
    centred = t.sub_(mean)
    if hidden is not None:
        centred.masked_fill_(hidden, 0.0)
    logit_norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    # A visible -inf is the one value that leaves the entropy finite; the mean of t shows it.
    entropy = torch.where(mean.isfinite(), entropy, math.nan)
    entropy = torch.where(num_keys > 0, entropy, 0.0)

    bias_norm = None if block.bias is None else _centred_norm(block.bias, hidden, Tk)
    results = (entropy, num_keys, max_logit, logit_norm)
    return (*(x.squeeze(-1) for x in results), bias_norm)


def _centred_norm(bias: Tensor, hidden: Tensor | None, Tk: int) -> Tensor:
    """`‖b - mean(b)‖₂` over visible keys, `[b or 1, h or 1, r or 1]`."""
    bias = bias.expand(*bias.shape[:-1], Tk)
    if hidden is None:
        return torch.linalg.vector_norm(bias - bias.mean(-1, keepdim=True), dim=-1)
    hidden = hidden.expand(*hidden.shape[:-1], Tk)
    n = (~hidden).sum(-1, keepdim=True).clamp(min=1)
    seen = torch.where(hidden, 0.0, bias)
    centred = torch.where(hidden, 0.0, seen - seen.sum(-1, keepdim=True) / n)
    return torch.linalg.vector_norm(centred, dim=-1)

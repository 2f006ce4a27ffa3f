"""From the logits of a block of rows to what is kept of each row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_monitor.measures._logits import Block


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


def without_keys(like: Tensor, num_rows: int, dtype: torch.dtype) -> RowStatistics:
    """Statistics `[B, H, num_rows]` of rows that see no key: what `reduce_block` then writes into."""
    shape = (*like.shape[:2], num_rows)
    fill = (0.0, 0.0, -math.inf, 0.0, 0.0)
    return RowStatistics(*(like.new_full(shape, value, dtype=dtype) for value in fill))


def reduce_block(block: Block, out: RowStatistics) -> None:
    """Write the statistics of a block's rows into their place in `out`, overwriting the block's logits."""
    u, hidden, place = block.logits, block.hidden, block.place
    num_keys = u.shape[-1]
    if num_keys == 0:
        return
    max_logit, argmax = u.max(-1, keepdim=True)
    seen = _count(hidden, num_keys, max_logit)
    t = _keep_visible(u.sub_(max_logit), hidden)
    e = _keep_visible(t.exp(), hidden)
    # A visible -inf makes 0 · -inf here, so that it shows as NaN as +inf and NaN do.
    weighted = (e * t).sum(-1, keepdim=True)
    # l = 1 + rest: adding the 1 first would round away all digits of a rest below 1e-7.
    rest = e.scatter_(-1, argmax, 0.0).sum(-1, keepdim=True)
    entropy = rest.log1p() - weighted / (1 + rest)

    mean = t.sum(-1, keepdim=True) / seen.clamp(min=1)
    logit_norm = _norm(_keep_visible(t.sub_(mean), hidden))

    out.entropy[place] = torch.where(seen > 0, entropy, 0.0).squeeze(-1)
    out.num_keys[place] = seen.squeeze(-1)
    out.max_logit[place] = max_logit.squeeze(-1)
    out.logit_norm[place] = logit_norm.squeeze(-1)
    if block.bias is not None:
        out.bias_norm[place] = _bias_norm(block.bias, hidden, num_keys).squeeze(-1)


def _count(hidden: Tensor | None, num_keys: int, like: Tensor) -> Tensor:
    """Visible keys of each row, in the shape and dtype of `like`."""
    if hidden is None:
        return torch.full_like(like, num_keys)
    each_stands_for = num_keys // hidden.shape[-1]  # all, where the mask is broadcast over keys
    visible = (~hidden).sum(-1, keepdim=True, dtype=like.dtype)
    return (visible * each_stands_for).expand_as(like)


def _bias_norm(bias: Tensor, hidden: Tensor | None, num_keys: int) -> Tensor:
    """`‖b - mean(b)‖₂` over visible keys, `[b or 1, h or 1, r or 1, 1]`."""
    bias = bias.expand(*bias.shape[:-1], num_keys)
    if hidden is None:
        return _norm(bias - bias.mean(-1, keepdim=True))
    hidden = hidden.expand(*hidden.shape[:-1], num_keys)
    b = torch.where(hidden, 0.0, bias)
    mean = b.sum(-1, keepdim=True) / _count(hidden, num_keys, b[..., :1]).clamp(min=1)
    return _norm(_keep_visible(b - mean, hidden))


def _keep_visible(values: Tensor, hidden: Tensor | None) -> Tensor:
    """Zero at hidden keys, in place."""
    return values if hidden is None else values.masked_fill_(hidden, 0.0)


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return norm

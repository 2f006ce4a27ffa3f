"""From the logits of a block of rows to what is kept of each row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_monitor.measures._logits import Block, Cover, Scratch
from entropy_monitor.measures._precision import on_host

_SHARP = 2.0**-7  # below it a rest that was summed with the 1 is known to less than 5 digits
_VANISHING = -87.0  # the exponential of it is the smallest that float32 holds with all digits

_exponentials = Scratch()


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
    """Statistics `[B, H, num_rows]` of rows that see no key: what `Reduction` then writes into."""
    shape = (*like.shape[:2], num_rows)
    fill = (0.0, 0.0, -math.inf, 0.0, 0.0)
    return RowStatistics(*(like.new_full(shape, value, dtype=dtype) for value in fill))


class Reduction:
    """Takes blocks of logits, and gives what is kept of each row.

    Args:
        like: the result's dtype and device are its own, its first two dimensions B and H.
        num_rows: rows of each head.
        dtype: of the result.
    """

    def __init__(self, like: Tensor, num_rows: int, dtype: torch.dtype) -> None:
        self._out = without_keys(like, num_rows, dtype)
        self._rest = torch.zeros_like(self._out.entropy)
        self._weighted = torch.zeros_like(self._out.entropy)

    def add(self, block: Block) -> None:
        """Reduce a block, overwriting its logits."""
        t, place, cover = block.logits, block.place, block.cover
        num_keys = t.shape[-1]
        if num_keys == 0:
            return
        seen = t.new_full((1,), num_keys) if cover is None else cover.counts(num_keys, t.dtype)
        max_logit = t.amax(-1, keepdim=True)
        t.sub_(max_logit)
        # Exponentials that vanish take ten times as long on a CPU, and so do sums with those that nearly do.
        e = torch.clamp(t, min=_VANISHING, out=_exponentials.like(t, tuple(t.shape))).exp_()
        _keep_visible(t, cover)
        self._rest[place] = _rest_on_host(e) if on_host(t) else _rest(t, e)
        self._weighted[place] = e.mul_(t).sum(-1)
        t.sub_(t.sum(-1, keepdim=True) / seen.clamp(min=1))
        _keep_visible(t, cover)
        self._out.logit_norm[place] = torch.linalg.vector_norm(t, dim=-1)
        self._out.num_keys[place] = seen.squeeze(-1)
        self._out.max_logit[place] = max_logit.squeeze(-1)
        if block.bias is not None:
            hidden = None if cover is None else cover.hidden
            self._out.bias_norm[place] = _bias_norm(block.bias, hidden, num_keys).squeeze(-1)

    def result(self) -> RowStatistics:
        """The statistics of all rows."""
        entropy = self._rest.log1p() - self._weighted / (1 + self._rest)
        entropy = torch.where(entropy.isfinite(), entropy, math.nan)  # a visible -inf is as bad as NaN
        out, some = self._out, self._out.num_keys > 0
        return out._replace(
            entropy=torch.where(some, entropy, 0.0), max_logit=torch.where(some, out.max_logit, -math.inf)
        )


def _rest(t: Tensor, e: Tensor) -> Tensor:
    """`Σ e` without the largest, which is 1, `[b, h, r]`; of several largest one is left out.

    With it l = 1 + rest: adding the 1 first would round away all digits of a rest below 1e-7.
    """
    rest: Tensor = e.scatter(-1, t.argmax(-1, keepdim=True), 0.0).sum(-1)
    return rest


def _rest_on_host(e: Tensor) -> Tensor:
    """The same, looking for the largest only in rows so sharp that the sum has lost digits."""
    rest: Tensor = e.sum(-1) - 1
    sharp = (rest < _SHARP).flatten().nonzero()[:, 0]
    if sharp.numel():
        rows = e.flatten(0, -2).index_select(0, sharp)
        rows.scatter_(-1, rows.argmax(-1, keepdim=True), 0.0)
        rest.view(-1)[sharp] = rows.sum(-1)
    return rest


def _keep_visible(values: Tensor, cover: Cover | None) -> None:
    """Zero at hidden keys, in place."""
    if cover is None:
        return
    part = values[..., cover.first :]
    if on_host(values):
        part.mul_(cover.visible)
    else:
        part.masked_fill_(cover.hidden, 0.0)


def _bias_norm(bias: Tensor, hidden: Tensor | None, num_keys: int) -> Tensor:
    """`‖b - mean(b)‖₂` over visible keys, `[b or 1, h or 1, r or 1, 1]`."""
    bias = bias.expand(*bias.shape[:-1], num_keys)
    if hidden is None:
        centred = bias - bias.mean(-1, keepdim=True)
    else:
        hidden = hidden.expand(*hidden.shape[:-1], num_keys)
        b = torch.where(hidden, 0.0, bias)
        count = (~hidden).sum(-1, keepdim=True, dtype=b.dtype).clamp(min=1)
        centred = torch.where(hidden, 0.0, b - b.sum(-1, keepdim=True) / count)
    norm: Tensor = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return norm

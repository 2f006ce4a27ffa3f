"""Whether q·k explains the logits of hand-written attention: then its scale is known, and no bias was added."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_monitor.measures import hidden_logits

_ROWS = 64
_TOLERANCE = 1e-3  # of the logits' own size; float32 products agree to 1e-6
_TOLERANCE_LOW = 3e-2  # bf16 and fp16 logits carry their own rounding


@torch.no_grad()
def explained_scale(q: Tensor, k: Tensor, logits: Tensor, rows: Tensor | None) -> Tensor:
    """The scale c with `logits = c · q kᵀ` up to a shift of each row, over visible keys.

    Checked on at most 64 of the rows read, evenly spaced, of every sequence and head.

    Args:
        q: `[B, H, T, D]`.
        k: `[B, K, S, D]`, K a divisor of H.
        logits: `[B, H, T, S]` as they enter the softmax.
        rows: the rows read; None for all.

    Returns:
        Scalar tensor on the device, NaN where no c explains the logits: biases, a soft-cap, or anything else that
        is not told by q and k.
    """
    if rows is None:
        rows = torch.arange(q.shape[2], device=q.device)
    rows = rows[:: max(1, math.ceil(rows.shape[0] / _ROWS))]
    low = torch.finfo(logits.dtype).bits < 32 or torch.finfo(q.dtype).bits < 32
    with torch.autocast(q.device.type, enabled=False):
        seen = logits.index_select(2, rows)
        visible = ~hidden_logits(seen)
        heads = q.index_select(2, rows).float().unflatten(1, (k.shape[1], -1))
        made = (heads @ k.float().transpose(-1, -2).unsqueeze(2)).flatten(1, 2)
        made, seen = _centred(made, visible), _centred(seen.float(), visible)
        power = made.square().sum()
        scale = (made * seen).sum() / power
        left = (seen - scale * made).abs().amax((-1, -2))
        size = seen.abs().amax((-1, -2))
        fits = (left <= (_TOLERANCE_LOW if low else _TOLERANCE) * size + 1e-6).all()
        return torch.where(fits & (power > 0), scale, math.nan)


def _centred(x: Tensor, visible: Tensor) -> Tensor:
    x = torch.where(visible, x, 0.0)
    mean = x.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(visible, x - mean, 0.0)

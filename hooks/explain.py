"""What hand-written attention adds to q·k: the biases behind its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entropy_monitor.hooks.calls import Inputs
from entropy_monitor.hooks.logits import Scale
from entropy_monitor.measures import hidden_logits

_BLOCK = 64  # rows at a time


@torch.no_grad()
def bias_norm(inputs: Inputs, logits: Tensor, rows: Tensor | None) -> Tensor:
    """`‖b_i - mean(b_i)‖₂` over visible keys, where logits = cap(scale · q kᵀ) + b; `[B, H, R]`.

    Args:
        inputs: q and k, and what they are multiplied with.
        logits: `[B, H, T, S]` as they enter the softmax.
        rows: the rows read; None for all.

    Returns:
        NaN where the scale is not known.
    """
    b, h, t = logits.shape[:3]
    n = t if rows is None else rows.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if inputs.scale is None:
        return torch.full((b, h, n), math.nan, dtype=dtype, device=logits.device)
    parts = []
    with torch.autocast(logits.device.type, enabled=False):
        k = inputs.k.to(dtype).transpose(-1, -2).unsqueeze(2)
        for i in range(0, n, _BLOCK):
            some = slice(i, i + _BLOCK)
            chosen = some if rows is None else rows[some]
            seen = logits[:, :, chosen]
            q = torch.unflatten(inputs.q[:, :, chosen].to(dtype), 1, (inputs.k.shape[1], -1))
            made = (q @ k).flatten(1, 2)
            if inputs.inner is not None:
                made = (made * inputs.inner).tanh()
            made = made * inputs.scale
            visible = ~hidden_logits(seen)
            difference = torch.where(visible, seen.to(dtype) - made, 0.0)
            mean = difference.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
            centred = torch.where(visible, difference - mean, 0.0)
            parts.append(torch.linalg.vector_norm(centred, dim=-1))
    return torch.cat(parts, dim=-1)


def steepest(inputs: Inputs) -> Scale | None:
    """The factor of q·k in the logits, or where a soft-cap shrinks them an upper bound of it."""
    if inputs.scale is None or inputs.inner is None:
        return inputs.scale
    return inputs.scale * inputs.inner

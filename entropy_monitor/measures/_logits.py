"""Attention logits of some query rows, a block at a time, as the softmax is about to see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import masks
from entropy_monitor.measures._blocks import blocks
from entropy_monitor.measures._precision import matmul, working_dtype

TEMPORARIES = 8  # of a logit's size, live at once while one block is made and reduced
_MODIFYING = 16  # of them more, where something else modifies logits: it may keep indices of 8 bytes

Modify = Callable[[Tensor, slice, slice, Tensor], tuple[Tensor, Tensor | None]]


class Block(NamedTuple):
    """Logits of some sequences, query heads and rows.

    `hidden` (True = the softmax does not see this key) and `bias` (the additive mask) keep
    broadcast dimensions; None means that nothing is hidden, or nothing added. Hidden logits are
    -inf.
    """

    place: tuple[slice, slice, slice]
    logits: Tensor
    hidden: Tensor | None
    bias: Tensor | None


def logit_blocks(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    rows: Tensor | None,
    max_bytes: int,
    modify: Modify | None = None,
) -> Iterator[Block]:
    """Yield `modify(cap(scale · q kᵀ)) + mask` of the chosen rows; arguments are `row_statistics`' own."""
    B, H, Tq, D = q.shape
    Hk, Tk = k.shape[1], k.shape[2]
    dtype = working_dtype(q, k)
    size = dtype.itemsize
    scale = D**-0.5 if scale is None else scale
    two_valued = None
    if mask is not None:
        mask = masks.as_four_dimensions(mask, (B, H, Tq, Tk))
        if mask.dtype != torch.bool:
            two_valued = masks.is_two_valued(mask, max_bytes)
    R = Tq if rows is None else rows.shape[0]
    group = H // Hk
    for place in blocks(
        B,
        H,
        R,
        group=group,
        row_bytes=max(1, size * ((TEMPORARIES + (_MODIFYING if modify else 0)) * Tk + 2 * D)),
        head_bytes=min(4 * size * Tk * D, max_bytes // 4),
        max_bytes=max_bytes,
    ):
        b, h, r = place
        chosen = r if rows is None else rows[r]
        heads = slice(h.start // group, (h.stop - 1) // group + 1)
        q_block = q[b, h]
        q_block = q_block[:, :, chosen] if isinstance(chosen, slice) else q_block.index_select(2, chosen)
        logits = _product(q_block, k[b, heads], dtype, max_bytes // 8)
        # Not into q: scaled, bfloat16 values would no longer fit a product of reduced precision.
        if softcap is None:
            logits.mul_(scale)
        else:
            logits.mul_(scale / softcap).tanh_().mul_(softcap)
        hidden: Tensor | None = None
        bias: Tensor | None = None
        if modify is not None:
            plain = logits
            logits, hidden = modify(plain, b, h, _indices(chosen, q.device))
            if logits is not plain:
                bias = logits - plain
        if mask is not None:
            part = masks.cut(mask, b, h, chosen)
            by_mask = masks.hidden(part, two_valued)
            hidden = by_mask if hidden is None else hidden | by_mask
            if part.dtype != torch.bool:
                added = part.to(dtype)
                bias = added if bias is None else bias + added
                logits.add_(added)
        if is_causal:
            future = _future(chosen, Tk, q.device)
            hidden = future if hidden is None else hidden | future
        if hidden is not None:
            logits.masked_fill_(hidden, -math.inf)
        yield Block(place, logits, hidden, bias)


def _product(q: Tensor, k: Tensor, dtype: torch.dtype, max_bytes: int) -> Tensor:
    """`q [b, h, r, D] · k [b, g, Tk, D]ᵀ` in dtype; a key head serves h / g query heads."""
    b, h, r, D = q.shape
    g, Tk = k.shape[1], k.shape[2]
    # bfloat16 values go through products of any precision unrounded.
    multiply = torch.matmul if q.dtype == k.dtype == torch.bfloat16 else matmul
    q = q.to(dtype).reshape(b * g, h // g * r, D)
    # Keys are cast up piece by piece: of 100k keys the float32 copy would be the largest temporary.
    step = max(1, max_bytes // max(1, b * g * D * dtype.itemsize))
    if step >= Tk:
        logits = multiply(q, k.to(dtype).reshape(b * g, Tk, D).mT)
    else:
        logits = q.new_empty(b * g, h // g * r, Tk)
        for t in range(0, Tk, step):
            piece = k[:, :, t : t + step].to(dtype).reshape(b * g, -1, D)
            logits[:, :, t : t + step] = multiply(q, piece.mT)
    return logits.view(b, h, r, Tk)


def _future(rows: slice | Tensor, Tk: int, device: torch.device) -> Tensor:
    """`[1, 1, r, Tk]`: keys behind the diagonal, which starts at the upper left as in SDPA."""
    keys = torch.arange(Tk, device=device)
    return (keys > _indices(rows, device)[:, None])[None, None]


def _indices(rows: slice | Tensor, device: torch.device) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows.to(device)


def check_operands(
    q: Tensor, k: Tensor, scale: float | None, softcap: float | None, rows: Tensor | None
) -> None:
    """Raise `ConfigurationError` for operands that no attention could have been called with."""
    if q.dim() != 4 or k.dim() != 4:
        raise ConfigurationError(
            f"q and k must be [batch, heads, tokens, head size], got {tuple(q.shape)} and "
            f"{tuple(k.shape)}; add the missing dimensions with unsqueeze"
        )
    if not (q.dtype.is_floating_point and k.dtype.is_floating_point):
        raise ConfigurationError(f"q and k must be floating, got {q.dtype} and {k.dtype}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ConfigurationError(
            f"q and k must agree in batch and head size, got {tuple(q.shape)} and "
            f"{tuple(k.shape)}; expand the broadcast dimension first"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ConfigurationError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly; "
            f"the number of query heads must be a multiple of the number of key heads"
        )
    if scale is not None and not math.isfinite(scale):
        raise ConfigurationError(f"scale must be finite, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ConfigurationError(
            f"softcap must be positive and finite, got {softcap}; pass None for no soft-cap"
        )
    check_rows(rows)


def check_rows(rows: Tensor | None) -> None:
    """Raise `ConfigurationError` unless `rows` is None or a vector of integers."""
    if rows is not None and (rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32)):
        raise ConfigurationError(
            f"rows must be a one-dimensional int64 tensor of query rows, got {rows.dtype} of shape "
            f"{tuple(rows.shape)}; systematic_rows makes one"
        )

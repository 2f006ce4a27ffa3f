"""Attention logits of some query rows, a block at a time, as the softmax is about to see them."""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.nn import functional as F

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import masks
from entropy_monitor.measures._blocks import blocks
from entropy_monitor.measures._precision import matmul, on_host, products_round, working_dtype

TEMPORARIES = 4  # of a logit's size, live at once while one block is made and reduced
_MODIFYING = 16  # of them more, where something else modifies logits: it may keep indices of 8 bytes
_ON_HOST = 2  # on the CPU, where they are made in the same memory again
_CACHE = 2**23  # bytes of a block there: what is read again and again should not leave the caches
_ROWS = 64  # of a causal block there: rows need no keys behind the last of them
_ROWS_ELSEWHERE = 1024
_PIECES = 4  # of chosen rows, for the same reason
_PIECE = 2**17  # logits; for fewer a piece is not worth its calls

HIDDEN = -1e38
"""What stands for a hidden logit: its exponential is 0, and unlike -inf it has a product with 0."""

Modify = Callable[[Tensor, slice, slice, Tensor], tuple[Tensor, Tensor | None]]


class Cover:
    """Which keys are hidden from the rows of a block.

    Attributes:
        hidden: boolean, True = the softmax does not see this key; broadcastable to `logits[..., first:]`.
        first: the keys before it are seen by all rows.
    """

    def __init__(self, hidden: Tensor, first: int = 0) -> None:
        self.hidden = hidden
        self.first = first

    @functools.cached_property
    def visible(self) -> Tensor:
        """1 for keys that are seen, 0 for others: on the CPU a product takes a tenth of a choice's time."""
        return (~self.hidden).float()

    @functools.cached_property
    def added(self) -> Tensor:
        """What hides keys when it is added to their logits."""
        return self.hidden.float() * HIDDEN

    def behind(self, first: int) -> Cover:
        """The same, behind so many keys that all rows see."""
        other = copy.copy(self)  # with what has been computed
        other.first = first
        return other

    def counts(self, num_keys: int, dtype: torch.dtype) -> Tensor:
        """Keys of `num_keys` that each row sees, `[b or 1, h or 1, r or 1, 1]`."""
        each_stands_for = (num_keys - self.first) // self.hidden.shape[-1]  # where it is broadcast over keys
        return (~self.hidden).sum(-1, keepdim=True, dtype=dtype) * each_stands_for + self.first


class Block(NamedTuple):
    """Logits of some sequences, query heads and rows, over the first keys: rows see none of the others.

    Attributes:
        place: which sequences, heads and rows these are.
        logits: `[b, h, r, n]`, free to be overwritten; those that are hidden are at most `HIDDEN / 2`.
        cover: which keys are hidden; None means that none is.
        bias: the additive mask or what else was added, broadcastable; None where nothing is.
    """

    place: tuple[slice, slice, slice]
    logits: Tensor
    cover: Cover | None
    bias: Tensor | None


class Scratch(threading.local):
    """Memory that one block after the other is made in.

    On the CPU it is kept for the next call: to get fresh pages from the system takes longer than to use them.
    It is plain memory whatever the call was: what is allocated in inference mode, or by a subclass or a mode
    such as that of fake tensors, serves nobody else.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def like(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised contiguous tensor of a shape, in the dtype and on the device of `x`."""
        count = math.prod(shape)
        if type(x) is not Tensor or count * x.element_size() > _CACHE or not on_host(x) or _is_interpreted():
            return x.new_empty(shape)
        if self._memory is None or self._memory.dtype != x.dtype or len(self._memory) < count:
            with torch.inference_mode(False):
                self._memory = x.new_empty(count)
        return self._memory[:count].view(shape)


def _is_interpreted() -> bool:
    """Whether torch.func, which may not write to what it captured, or a mode as of fake tensors is active."""
    return peek_interpreter_stack() is not None or _len_torch_dispatch_stack() > 0


_made = Scratch()


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
    by_adding: bool = False,
) -> Iterator[Block]:
    """Yield `modify(cap(scale · q kᵀ)) + mask` of the chosen rows; arguments are `row_statistics`' own.

    A block's logits are overwritten by the next. With `by_adding` logits are hidden by a sum, which takes
    a tenth of the time on the CPU; what is not finite then shows through.
    """
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    dtype = working_dtype(q, k)
    scale = D**-0.5 if scale is None else scale
    factor = scale if softcap is None else scale / softcap
    # bfloat16 values go unrounded through products of any precision.
    splits = dtype != torch.float64 and products_round() and not q.dtype == k.dtype == torch.bfloat16
    two_valued = None
    if mask is not None:
        mask = masks.as_four_dimensions(mask, (B, H, Tq, Tk))
        if mask.dtype != torch.bool:
            two_valued = masks.is_two_valued(mask, max_bytes)
    if k.numel() * dtype.itemsize <= max_bytes // 4:
        k = k.to(dtype)
    group = H // k.shape[1]
    spans = _spans(q, rows, Tk) if is_causal else [(0, Tq if rows is None else rows.shape[0], Tk)]
    future = _Future(spans[0][1] if is_causal and rows is None and spans else 0, q.device)
    for place, n in _places(q, k, spans, modify is not None, dtype, max_bytes):
        b, h, r = place
        chosen = r if rows is None else rows[r]
        heads = slice(h.start // group, (h.stop - 1) // group + 1)
        q_block = q[b, h]
        q_block = q_block[:, :, chosen] if isinstance(chosen, slice) else q_block.index_select(2, chosen)
        logits = _product(q_block, k[b, heads, :n], factor, splits, dtype, max_bytes // 8, modify is None)
        if softcap is not None:
            logits.tanh_().mul_(softcap)
        hidden: Tensor | None = None
        bias: Tensor | None = None
        if modify is not None:
            plain = logits
            logits, hidden = modify(plain, b, h, _indices(chosen, q.device))
            if logits is not plain:
                bias = logits - plain
                # Theirs may be a table of the model, or one number for all: it is not ours to write to.
                logits = logits.expand(plain.shape).clone(memory_format=torch.contiguous_format)
        if mask is not None:
            part = masks.cut(mask, b, h, chosen)
            part = part[..., :n] if part.shape[-1] > 1 else part
            by_mask = masks.hidden(part, two_valued)
            hidden = by_mask if hidden is None else hidden | by_mask
            if part.dtype != torch.bool:
                added = part.to(dtype)
                logits.add_(added.masked_fill(by_mask, 0.0) if by_adding else added)
                bias = added if bias is None else bias + added
        cover = None if hidden is None else Cover(hidden)
        if is_causal:
            cover = future.of(r, n, cover) if rows is None else _chosen_future(rows[r], n, cover)
        if cover is not None:
            part = logits[..., cover.first :]
            if by_adding:
                part.add_(cover.added)
            else:
                part.masked_fill_(cover.hidden, HIDDEN)
        yield Block(place, logits, cover, bias)


def _spans(q: Tensor, rows: Tensor | None, num_keys: int) -> list[tuple[int, int, int]]:
    """Rows, from the first to before the last, and how many keys they may see: none behind the last row."""
    if rows is None:
        height, count = (_ROWS if on_host(q) else _ROWS_ELSEWHERE), q.shape[2]
        starts = range(0, count, height)
        return [(i, min(i + height, count), min(num_keys, i + height, count)) for i in starts]
    count = rows.shape[0]
    pieces = min(_PIECES, q.shape[0] * q.shape[1] * count * num_keys // _PIECE) if on_host(q) else 1
    if pieces < 2:
        return [(0, count, num_keys)]
    height = -(-count // pieces)
    return [
        (i, min(i + height, count), min(num_keys, int(rows[i : i + height].max()) + 1))
        for i in range(0, count, height)
    ]


def _places(
    q: Tensor,
    k: Tensor,
    spans: list[tuple[int, int, int]],
    modified: bool,
    dtype: torch.dtype,
    max_bytes: int,
) -> Iterator[tuple[tuple[slice, slice, slice], int]]:
    """Blocks, each with the number of keys that its rows may see."""
    B, H, _, D = q.shape
    group = H // k.shape[1]
    host = on_host(q)
    temporaries = (_ON_HOST if host else TEMPORARIES) + (_MODIFYING if modified else 0)
    if host:
        max_bytes = min(max_bytes, _CACHE * (4 if modified else 1))
    for first, last, n in spans:
        for b, h, r in blocks(
            B,
            H,
            last - first,
            group=group,
            row_bytes=max(1, dtype.itemsize * (temporaries * n + 2 * D)),
            head_bytes=0 if k.dtype == dtype else min(4 * dtype.itemsize * n * D, max_bytes // 4),
            max_bytes=max_bytes,
        ):
            yield (b, h, slice(first + r.start, first + r.stop)), n


class _Future:
    """Keys behind the diagonal, which starts at the upper left as in SDPA, of blocks of rows."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._square = torch.ones(rows, rows, dtype=torch.bool, device=device).triu(1)[None, None]
        self._covers: dict[tuple[int, int], Cover] = {}

    def of(self, rows: slice, n: int, cover: Cover | None) -> Cover | None:
        """Joined with what is hidden anyway."""
        first = min(rows.start, n)
        size = (rows.stop - rows.start, n - first)
        if size[1] == 0:
            return cover
        if cover is not None:
            hidden = F.pad(self._square[..., : size[0], : size[1]], (first, 0))
            return Cover(cover.hidden | hidden)
        if size not in self._covers:
            self._covers[size] = Cover(self._square[..., : size[0], : size[1]])
        return self._covers[size].behind(first)


def _chosen_future(rows: Tensor, n: int, cover: Cover | None) -> Cover | None:
    first = min(n, int(rows.min())) if cover is None and rows.numel() and on_host(rows) else 0
    if first == n:
        return cover
    hidden = (torch.arange(first, n, device=rows.device) > rows[:, None])[None, None]
    return Cover(hidden, first) if cover is None else Cover(cover.hidden | hidden)


def _product(
    q: Tensor, k: Tensor, factor: float, splits: bool, dtype: torch.dtype, max_bytes: int, in_scratch: bool
) -> Tensor:
    """`factor · q [b, h, r, D] · k [b, g, n, D]ᵀ` in dtype; a key head serves h / g query heads."""
    b, h, r, D = q.shape
    g, n = k.shape[1], k.shape[2]
    q = q.to(dtype)
    # What modifies logits may measure something itself, in the same memory.
    size = (b, g, h // g * r, n)
    logits = _made.like(q, size) if in_scratch else q.new_empty(size)
    # Keys are cast up piece by piece: of 100k keys the float32 copy would be the largest temporary.
    step = n if k.dtype == dtype else max(1, max_bytes // max(1, g * D * dtype.itemsize))
    for i in range(b):  # products of one sequence take q and k as they lie in memory
        queries = q[i].reshape(g, h // g * r, D)
        for t in range(0, n, max(1, step)):
            keys, into = k[i, :, t : t + step].to(dtype).mT, logits[i, :, :, t : t + step]
            # The factor not into q: scaled, bfloat16 values no longer fit a product of reduced precision.
            if splits:
                into.copy_(matmul(queries, keys)).mul_(factor)
            elif step >= n:
                torch.baddbmm(into, queries, keys, beta=0, alpha=factor, out=into)
            else:
                into.copy_(torch.bmm(queries, keys)).mul_(factor)
    return logits.view(b, h, r, n)


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
            f"{tuple(rows.shape)}; stratified_rows makes one"
        )

"""Source: `xformers.ops.memory_efficient_attention`, with all of its biases but paged ones."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from entropy_monitor.hooks.calls import Inputs, Modify, Seen
from entropy_monitor.hooks.site import Site
from entropy_monitor.hooks.sources.band import Band
from entropy_monitor.hooks.unread import UnreadError

NAME = "memory_efficient_attention"
GIVES_WEIGHTS = False

_MODULES = ("xformers.ops", "xformers.ops.fmha")
_FUNCTIONS = (
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
)


def functions() -> Iterator[FunctionType]:
    """The functions that exist in this process, without importing anything."""
    found: dict[int, FunctionType] = {}
    for module in _MODULES:
        for name in _FUNCTIONS:
            function = getattr(sys.modules.get(module), name, None)
            if isinstance(function, FunctionType):
                found[id(function)] = function
    yield from found.values()


def read(function: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> Seen | None:
    """What a call attends with: queries `[B, T, H, D]`, `[B, T, G, H, D]` or `[B, T, D]`.

    Args:
        function: that is called.
        args: of the call.
        kwargs: of the call.
        site: where it is called.
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    query, key, value = a["query"], a["key"], a["value"]
    origins = {"query": site.origin_of(query), "key": site.origin_of(key)}
    q, k = _by_heads(query, site.heads), _by_heads(key, site.heads)
    scale = a.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    mask, modify = _bias(a.get("attn_bias"), q, k, query.dim())
    return Seen(
        NAME,
        Inputs(q, k, mask, scale=scale, modify=modify),
        value=value,
        tensors={"query": q, "key": k},
        origins=origins,
        output_size=query.shape[:-1].numel() * value.shape[-1],
    )


def _by_heads(x: Tensor, heads: int | None) -> Tensor:
    """As `[B, H, T, D]`; three dimensions are sequences of one head, or heads folded into the batch."""
    if x.dim() == 5:
        return x.flatten(2, 3).transpose(1, 2) if x.stride(3) else x.permute(0, 2, 3, 1, 4).flatten(1, 2)
    if x.dim() == 4:
        return x.transpose(1, 2)
    if heads is not None and heads > 1 and x.shape[0] % heads == 0:
        return torch.unflatten(x, 0, (-1, heads))
    return x[:, None]


def _bias(bias: Any, q: Tensor, k: Tensor, dims: int) -> tuple[Tensor | None, Modify | None]:
    """An attention bias as a mask, or as what it does to logits."""
    if bias is None:
        return None, None
    if isinstance(bias, Tensor):
        if dims == 3:  # [B·H, T, S]
            bias = bias.expand(q.shape[0] * q.shape[1], q.shape[2], k.shape[2])
            bias = torch.unflatten(bias, 0, q.shape[:2])
        elif bias.dim() == 5:
            bias = bias.flatten(1, 2)
        return bias, None
    band = _simple(bias, q.shape[2], k.shape[2])
    if band is not None:
        inner = getattr(bias, "_bias", None)
        if isinstance(inner, Tensor) and inner.dim() == 5:
            inner = inner.flatten(1, 2)
        return inner, band
    if hasattr(bias, "q_seqinfo"):
        return None, _Blocks(bias, q.shape[2], k.shape[2])
    shape = (1, 1, q.shape[2], k.shape[2])
    return bias.materialize(shape, dtype=torch.float32, device=q.device), None


def _simple(bias: Any, queries: int, keys: int) -> Band | None:
    """A bias that only positions make, the same in every sequence."""
    kind = type(bias).__name__
    corner = keys - queries
    if kind in ("LowerTriangularMask", "LowerTriangularMaskWithTensorBias"):
        return Band(0, None, 0)
    if kind == "LowerTriangularFromBottomRightMask":
        return Band(corner, None, 0)
    if kind == "LowerTriangularFromBottomRightLocalAttentionMask":
        return Band(corner, int(bias._window_size) - 1, 0)
    if kind == "LocalAttentionFromBottomRightMask":
        return Band(corner, int(bias.window_left), int(bias.window_right))
    return None


class _Blocks:
    """Sequences one after the other in one row of the batch: each sees its own keys, by its own rule.

    Only the parts of it that some rows need are ever made.

    Args:
        bias: of the `BlockDiagonal…` family; it says where sequences start and how each block looks.
        queries: how many there are, of all sequences.
        keys: likewise.
    """

    def __init__(self, bias: Any, queries: int, keys: int) -> None:
        if hasattr(bias, "block_tables"):
            raise UnreadError(f"xformers attention with paged keys ({type(bias).__name__}) is not read")
        starts = list(bias.q_seqinfo.seqstart_py)
        self._starts, self._blocks = starts, []
        self._queries, self._keys = queries, keys
        for (q0, q1), (k0, k1) in zip(bias.q_seqinfo.intervals(), bias.k_seqinfo.intervals(), strict=False):
            self._blocks.append((q0, q1, k0, k1, _rule(bias, q1 - q0, k1 - k0)))

    def __call__(
        self, logits: Tensor, batch: slice, heads: slice, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits as they are, and which keys are hidden, `[1, 1, r, S]`."""
        del batch, heads
        i, j = rows[:, None], torch.arange(logits.shape[-1], device=logits.device)
        seen = torch.zeros(len(rows), len(j), dtype=torch.bool, device=logits.device)
        for q0, q1, k0, k1, (shift, left, right) in self._blocks:
            own = (i >= q0) & (i < q1) & (j >= k0) & (j < k1)
            distance = (j - k0) - (i - q0) - shift
            if left is not None:
                own &= distance >= -left
            if right is not None:
                own &= distance <= right
            seen |= own
        return logits, ~seen[None, None]


def _rule(bias: Any, queries: int, keys: int) -> tuple[int, int | None, int | None]:
    """Where a block's diagonal starts, and how many keys before and behind it are seen."""
    kind = type(bias).__name__
    corner = keys - queries
    window = getattr(bias, "_window_size", None)
    left = None if window is None else int(window) - 1
    if kind in ("BlockDiagonalCausalMask", "BlockDiagonalCausalLocalAttentionMask"):
        return 0, left, 0
    if "Causal" in kind:
        return corner, left, 0
    if "Local" in kind:
        return corner, int(bias.window_left), int(bias.window_right)
    return 0, None, None

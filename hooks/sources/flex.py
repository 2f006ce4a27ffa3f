"""Source: FlexAttention, eager and compiled: `score_mod` and `mask_mod` asked of the rows that are read."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from entropy_monitor.hooks.calls import Inputs, Seen
from entropy_monitor.hooks.site import Site
from entropy_monitor.hooks.sources.interception import is_compiled_call

NAME = "flex_attention"
GIVES_WEIGHTS = False

_MODULE = "torch.nn.attention.flex_attention"
_HIDING = -5e8  # as in a mask, with a logit of any size added


def functions() -> Iterator[FunctionType]:
    """`flex_attention`, where it has been imported."""
    function = getattr(sys.modules.get(_MODULE), "flex_attention", None)
    if isinstance(function, FunctionType):
        yield function


def read(function: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> Seen:
    """What a call attends with.

    Args:
        function: that is called.
        args: of the call.
        kwargs: of the call.
        site: where it is called.
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    tensors = (a["query"], a["key"], a["value"])
    return seen(*tensors, a["score_mod"], a["block_mask"], a["scale"], is_compiled_call(), site)


def seen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    block_mask: Any,
    scale: float | None,
    compiled: bool,
    site: Site,
) -> Seen:
    """What FlexAttention attends with.

    Args:
        query: `[B, H, T, D]`.
        key: `[B or 1, K, S, D]`.
        value: `[B or 1, K, S, E]`.
        score_mod: the user's function of one score, or None.
        block_mask: a BlockMask, or None.
        scale: factor of q·k; None for `D^-1/2`.
        compiled: whether the compiled kernel runs.
        site: where it is called.
    """
    q, k = query, key
    if q.shape[0] != k.shape[0]:  # keys of one sequence serve many, told apart by the mask
        k = k.expand(q.shape[0], -1, -1, -1)
    modify = None
    if score_mod is not None or block_mask is not None:
        modify = _Modified(score_mod, block_mask, query.dtype, compiled)
    return Seen(
        NAME,
        Inputs(q, k, scale=q.shape[-1] ** -0.5 if scale is None else float(scale), modify=modify),
        value=value,
        tensors={"query": q, "key": k},
        origins={"query": site.origin_of(query), "key": site.origin_of(key)},
        output_size=query.shape[:-1].numel() * value.shape[-1],
    )


class _Modified:
    """What `score_mod` and a block mask do to logits.

    The compiled kernel visits only the blocks that a mask lists, and asks `mask_mod` in those that are not
    listed as full; the eager one asks `mask_mod` everywhere, and heeds no list.

    Args:
        score_mod: the user's function of one score, or None.
        block_mask: a BlockMask, or None.
        dtype: of the queries, which says what is as low as -inf.
        compiled: whether the compiled kernel runs.
    """

    def __init__(
        self, score_mod: Callable[..., Tensor] | None, block_mask: Any, dtype: torch.dtype, compiled: bool
    ) -> None:
        self._score_mod = score_mod
        self._mask = block_mask
        self._compiled = compiled
        self._hiding = max(_HIDING, torch.finfo(dtype).min / 2)

    def __call__(
        self, logits: Tensor, batch: slice, heads: slice, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `[b, h, r, S]` of some sequences, heads and rows, modified; and which keys are hidden."""
        device = logits.device
        b = torch.arange(batch.start, batch.stop, device=device, dtype=torch.int32)
        h = torch.arange(heads.start, heads.stop, device=device, dtype=torch.int32)
        j = torch.arange(logits.shape[-1], device=device, dtype=torch.int32)
        i = rows.to(torch.int32)
        hidden = None
        if self._score_mod is not None:
            logits = _each(self._score_mod, b, h, i, j, logits).to(logits.dtype)
            hidden = logits <= self._hiding
        if self._mask is not None:
            seen = _each(self._mask.mask_mod, b, h, i, j).expand(logits.shape)
            if self._compiled:
                seen = _visited(self._mask, seen, b, h, i, j)
            hidden = ~seen if hidden is None else hidden | ~seen
        return logits, hidden


def _each(mod: Callable[..., Tensor], b: Tensor, h: Tensor, i: Tensor, j: Tensor, *score: Tensor) -> Tensor:
    """`mod(score?, b, h, i, j)` at every combination of indices, as FlexAttention itself calls it."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    n = len(score)
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        mod = torch.vmap(mod, in_dims=(0,) * n + dims, out_dims=0)
    with torch._C._EnableTorchFunction(), TransformGetItemToIndex():
        return mod(*score, b, h, i, j)


def _visited(mask: Any, seen: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """What the compiled kernel sees of `seen`, what `mask_mod` says."""
    size_q, size_k = mask.BLOCK_SIZE
    block = (
        torch.div(i, size_q, rounding_mode="floor").long(),
        torch.div(j, size_k, rounding_mode="floor").long(),
    )
    partial = _listed(mask.kv_num_blocks, mask.kv_indices, b, h, *block)
    seen = seen & partial
    if mask.full_kv_num_blocks is not None:
        seen = seen | _listed(mask.full_kv_num_blocks, mask.full_kv_indices, b, h, *block)
    return seen


def _listed(counts: Tensor, indices: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Which blocks of keys are listed for each row's block, at each key: `[b, h, r, S]`."""
    b, h = (
        x.long() if n > 1 else torch.zeros_like(x).long() for x, n in zip((b, h), counts.shape, strict=False)
    )
    place = b[:, None, None], h[None, :, None], i[None, None, :].clamp(max=counts.shape[2] - 1)
    chosen = indices[place].long()  # [b, h, r, blocks]
    valid = torch.arange(chosen.shape[-1], device=chosen.device) < counts[place][..., None]
    blocks = int(j.shape[0]) if not chosen.shape[-1] else chosen.shape[-1]
    table = torch.zeros(*chosen.shape[:-1], blocks + 1, dtype=torch.bool, device=chosen.device)
    table = table.scatter(-1, torch.where(valid, chosen, blocks), valid)
    table[..., blocks] = False
    return table.index_select(-1, j.clamp(max=blocks - 1))

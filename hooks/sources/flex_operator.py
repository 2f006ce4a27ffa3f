"""Source: FlexAttention within compiled code, where it is an operator with its functions as graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention

from entropy_monitor.hooks.calls import Seen
from entropy_monitor.hooks.site import Site
from entropy_monitor.hooks.sources import flex

NAME = "flex_attention in a graph"
GIVES_WEIGHTS = False
FUNCTIONS = (flex_attention,)


@dataclass(frozen=True)
class _Blocks:
    """What `flex` asks of a BlockMask."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    BLOCK_SIZE: tuple[int, int]
    mask_mod: Callable[..., Tensor]


def read(args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> Seen:  # noqa: ARG001  it has none
    """What a call attends with; see `sources.Source`."""
    query, key, value, score_mod, mask, scale, _, score_buffers, mask_buffers = args
    listed, size = mask[2:6], (mask[-3], mask[-2])
    blocks = _Blocks(listed[0], listed[1], listed[2], listed[3], size, _with(mask[-1], mask_buffers))
    return flex.seen(query, key, value, _with(score_mod, score_buffers), blocks, scale, True, site)


def _with(function: Callable[..., Any], captured: Sequence[Any]) -> Callable[..., Any]:
    """The function as the user wrote it: what it captured are arguments of its graph."""
    return lambda *args: function(*args, *captured)

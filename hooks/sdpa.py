"""Source: `F.scaled_dot_product_attention`, under whatever name it was bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.hooks.arrangement import Arrangement, arrange_queries
from entropy_monitor.hooks.calls import Inputs, Seen
from entropy_monitor.hooks.lineage import Lineage

NAME = "scaled_dot_product_attention"
FUNCTIONS = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def read(args: tuple[Any, ...], kwargs: dict[str, Any], heads: int | None, lineage: Lineage) -> Seen:
    """What a call attends with.

    Args:
        args: of the call.
        kwargs: of the call.
        heads: how many heads the owner says it has, for `[B·H, T, D]` inputs.
        lineage: of the forward.
    """
    return _read(heads, lineage, *args, **kwargs)


def _read(
    heads: int | None,
    lineage: Lineage,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001  fewer key heads show in the shapes
) -> Seen:
    del dropout_p  # entropies are taken before dropout
    origins = {"query": lineage.origin_of(query), "key": lineage.origin_of(key)}
    n = query.dim() - 2
    if n == 1:
        arrangement = arrange_queries(query, lineage, origins["query"], heads)
    else:
        arrangement = Arrangement(tuple(range(n - 1)), (n - 1,) if n else ())
    q = arrangement.apply(query)
    k = arrangement.apply_to_keys(key, query) if n == 1 else _keys(key, q)
    mask = attn_mask
    if mask is not None and n != 2 and mask.dim() > 2:
        mask = arrangement.apply(mask.expand(*query.shape[:-2], *mask.shape[-2:]))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Seen(
        NAME,
        Inputs(as_kernel_sees(q), as_kernel_sees(k), mask, is_causal, scale),
        value=value,
        tensors={"query": q, "key": k},
        origins=origins,
        output_size=query.numel() // query.shape[-1] * value.shape[-1],
    )


def _keys(key: Tensor, q: Tensor) -> Tensor:
    """`[…, K, S, D]` as `[B, K, S, D]`."""
    if key.dim() == 2:
        return key[None, None]
    if key.dim() > 4:
        return key.flatten(0, -4)
    return key.expand(q.shape[0], *key.shape[1:])


def as_kernel_sees(tensor: Tensor) -> Tensor:
    """Rounded to autocast's dtype, where autocast would cast before the kernel runs."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype == torch.float32:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor

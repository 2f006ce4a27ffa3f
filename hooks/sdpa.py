"""Source: `F.scaled_dot_product_attention`, under whatever name it was bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.hooks.calls import Inputs, Seen

NAME = "scaled_dot_product_attention"
FUNCTIONS = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention)


def read(args: tuple[Any, ...], kwargs: dict[str, Any], heads: int | None) -> Seen | None:
    """What a call attends with. `heads` resolves `[B·H, T, D]` inputs, where the owner tells it."""
    return _read(heads, *args, **kwargs)


def _read(
    heads: int | None,
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
    output_size = query.numel() // query.shape[-1] * value.shape[-1]
    q, k, mask = as_kernel_sees(query), as_kernel_sees(key), attn_mask
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, mask = four_dimensional(q, k, value, mask, heads)
    inputs = Inputs(q, k, mask, is_causal, scale)
    return Seen(NAME, inputs, value=v, output_size=output_size)


def as_kernel_sees(tensor: Tensor) -> Tensor:
    """Rounded to autocast's dtype, where autocast would cast before the kernel runs."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype == torch.float32:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def four_dimensional(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, heads: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`[B, H, T, D]` from inputs with fewer or more leading dimensions; views wherever possible."""
    if q.dim() == 2:
        return q[None, None], k[None, None], v[None, None], mask
    if q.dim() == 3:
        n = q.shape[0]
        h = heads if heads and n % heads == 0 else 1
        if mask is not None and mask.dim() == 3:
            mask = mask.expand(n, *mask.shape[1:]).unflatten(0, (n // h, h))
        q, k, v = (x.expand(n, *x.shape[1:]).unflatten(0, (n // h, h)) for x in (q, k, v))
        return q, k, v, mask
    if q.dim() > 4:
        lead = q.shape[:-3]
        if mask is not None and mask.dim() > 3:
            mask = mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)
        q, k, v = (x.expand(*lead, *x.shape[-3:]).flatten(0, -4) for x in (q, k, v))
        return q, k, v, mask
    if k.shape[0] != q.shape[0]:
        k = k.expand(q.shape[0], -1, -1, -1)
    return q, k, v, mask

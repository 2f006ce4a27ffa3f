"""Source: softmax attention written by hand, in whatever spelling: `torch.softmax`, `F.softmax`, `nn.Softmax`, …

A softmax is taken for attention when its logits come from a product of two activations (`q @ k.mT`, `bmm`,
`baddbmm`, `einsum`): routers, gates and vocabularies do not, for theirs come from a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor.hooks.calls import Inputs, Seen
from entropy_monitor.hooks.products import Product

NAME = "softmax"
FUNCTIONS = (
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    torch.special.softmax,
    torch._softmax,
    torch.ops.aten.softmax,
    torch.ops.aten._softmax,
)


def logits_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, int] | None:
    """The tensor that a softmax call normalises, and along which dimension."""
    tensor = args[0] if args else kwargs.get("input", kwargs.get("self"))
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(tensor, Tensor) or not isinstance(dim, int):
        return None
    return tensor, dim % tensor.dim() if tensor.dim() else 0


def read(logits: Tensor, dim: int, product: Product | None, heads: int | None, folded: bool) -> Seen | None:
    """The call in `[B, H, T, S]` form.

    Args:
        logits: what the softmax normalises.
        dim: along which dimension.
        product: where the logits come from.
        heads: how many heads the owner says it has, if it does.
        folded: whether the first of three dimensions holds batch times heads.
    """
    if logits.dim() < 2:
        return None
    arranged = logits.movedim(dim, -1)
    shaped = _four_dimensional(arranged, heads, folded)
    inputs = None
    if product is not None and dim == logits.dim() - 1:
        inputs = _inputs(product, arranged, shaped)
    return Seen(NAME, inputs, logits=shaped)


def _four_dimensional(logits: Tensor, heads: int | None, folded: bool) -> Tensor:
    if logits.dim() == 2:
        return logits[None, None]
    if logits.dim() == 3:
        n = logits.shape[0]
        return logits.unflatten(0, (n // heads, heads)) if folded and heads else logits[:, None]
    if logits.dim() == 4:
        if heads and logits.shape[1] != heads and logits.shape[2] == heads:
            return logits.transpose(1, 2)
        return logits
    if heads and logits.dim() == 5 and logits.shape[1] * logits.shape[2] == heads:
        return logits.flatten(1, 2)  # [B, K, G, T, S]: grouped query heads
    return logits.flatten(0, -4)


def _inputs(product: Product, arranged: Tensor, shaped: Tensor) -> Inputs | None:
    """q and k as `[B, H, T, D]` and `[B, K, S, D]`; None where their shapes do not explain the logits."""
    b, h, t, s = shaped.shape
    q, k = product.q, product.k
    if q.shape[-2] != t or k.shape[-2] != s:
        return None
    if arranged.dim() == 5 and shaped.shape[1] == arranged.shape[1] * arranged.shape[2]:
        if q.dim() != 5 or k.dim() != 5 or k.shape[2] != 1:
            return None
        return Inputs(q.flatten(1, 2), k[:, :, 0])
    q_shaped = _shape_like(q, b, h)
    k_shaped = _shape_like(k, b, h)
    if k_shaped is None and k.dim() == 4 and k.shape[:2] == (b, 1):
        k_shaped = k  # one key head for all: the product broadcasts it
    if q_shaped is None or k_shaped is None:
        return None
    return Inputs(q_shaped, k_shaped)


def _shape_like(x: Tensor, b: int, h: int) -> Tensor | None:
    if x.dim() == 4 and x.shape[:2] == (b, h):
        return x
    if x.dim() == 3 and x.shape[0] == b * h:
        return x.unflatten(0, (b, h))
    if x.dim() == 2 and b * h == 1:
        return x[None, None]
    if x.dim() > 4 and x.shape[-3] == h and x.shape[:-3].numel() == b:
        return x.flatten(0, -4)
    return None

"""Products of two activations, in the spellings that attention logits come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Product:
    """A product of two activations that may become attention logits.

    Attributes:
        q: left operand, `[…, T, D]`.
        k: right operand, `[…, S, D]`.
    """

    q: Tensor
    k: Tensor


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
_ADDED = (torch.baddbmm, Tensor.baddbmm)
FUNCTIONS: frozenset[Callable[..., Any]] = frozenset({*_MATMULS, *_ADDED, torch.einsum})


def product_of(func: Callable[..., Any], args: tuple[Any, ...]) -> Product | None:
    """The operands of a product as q `[…, T, D]` and k `[…, S, D]`; None if this is no product of activations."""
    if func is torch.einsum:
        return _einsum(args)
    operands = args[1:3] if func in _ADDED else args[:2]
    if len(operands) != 2 or not all(isinstance(x, Tensor) for x in operands):
        return None
    left, right = operands
    if left.dim() < 2 or right.dim() < 2 or is_weight(right) or is_weight(left):
        return None
    return Product(left, right.transpose(-1, -2))


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a model's matrix (a parameter or a view of one) and no activation."""
    base = tensor if tensor._base is None else tensor._base
    return tensor.dim() == 2 and isinstance(base, nn.Parameter)


def _einsum(args: tuple[Any, ...]) -> Product | None:
    if len(args) == 2 and isinstance(args[1], (list, tuple)):
        args = (args[0], *args[1])
    if len(args) != 3 or not isinstance(args[0], str) or "..." in args[0]:
        return None
    equation, left, right = args
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    names, arrow, out = equation.replace(" ", "").partition("->")
    a, _, b = names.partition(",")
    contracted = (set(a) & set(b)) - set(out)
    if not arrow or len(contracted) != 1 or is_weight(left) or is_weight(right):
        return None
    if len(out) < 2 or out[-1] not in (set(a) ^ set(b)) or out[-2] not in (set(a) ^ set(b)):
        return None
    if out[-1] in a:
        (a, left), (b, right) = (b, right), (a, left)
    if out[-2] not in a:
        return None
    (c,) = contracted
    shared = out[:-2]
    if set(a) - {*shared, out[-2], c} or set(b) - {*shared, out[-1], c}:
        return None
    return Product(_permuted(left, a, shared + out[-2] + c), _permuted(right, b, shared + out[-1] + c))


def _permuted(tensor: Tensor, names: str, wanted: str) -> Tensor:
    """`tensor` with its dimensions in the wanted order, and size 1 for those that it lacks."""
    for missing in (n for n in wanted if n not in names):
        tensor, names = tensor.unsqueeze(-1), names + missing
    return tensor.permute([names.index(n) for n in wanted])

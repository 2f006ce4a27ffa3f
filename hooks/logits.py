"""From a product of queries and keys to the logits that a softmax sees: what was done to it on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from entropy_monitor.hooks.lineage import Origin
from entropy_monitor.hooks.products import Contraction
from entropy_monitor.hooks.storage import storage_of

Scale = float | Tensor
"""A factor of all logits, or of each head: a tensor whose last two dimensions are 1."""

_TIMES = frozenset({"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"})
_OVER = frozenset(
    {"div", "div_", "divide", "true_divide", "__truediv__", "__itruediv__", "__div__", "__idiv__"}
)
_PLUS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__"})
_HIDING = frozenset({"masked_fill", "masked_fill_", "where", "_where", "index_fill", "tril", "triu"})
_SAME = frozenset(
    {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "cat"}
)
_RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"})
_PERMUTES = frozenset(
    {"transpose", "permute", "movedim", "swapaxes", "moveaxis", "swapdims", "adjoint", "__get__", "t"}
)
_ROW_MAJOR = frozenset({"view", "reshape", "flatten", "unflatten"})
_KEEPS_SCALE = _PLUS | _HIDING | _SAME | _RESHAPES | _PERMUTES


@dataclass(frozen=True)
class Logits:
    """What is known of a tensor that was made from a product of queries and keys.

    It holds `cap(inner · q·k) · scale + anything`, cap being tanh where `inner` is not None.

    Attributes:
        contraction: the product.
        origins: of its two operands.
        names: the product's name of each of the tensor's dimensions; blank where not known.
        scale: factor so far; None where something else was done.
        inner: factor before a soft-cap.
        reshaped: the shape and the names from which the tensor was reshaped, where its own names do not tell
            any more: it may be reshaped back.
    """

    contraction: Contraction
    origins: tuple[Origin | None, Origin | None]
    names: tuple[str, ...]
    scale: Scale | None = 1.0
    inner: Scale | None = None
    reshaped: tuple[torch.Size, tuple[str, ...]] | None = None


def follow_logits(
    logits: Logits, tensor: Tensor, func: Callable[..., Any], args: tuple[Any, ...], result: Tensor
) -> Logits:
    """What is known of `result`, which `func` made from `tensor` and other arguments."""
    names = _names_after(logits.names, tensor, func, result)
    name = _name_of(func)
    reshaped = _reshaped(logits, tensor, name, result)
    if reshaped is not None and name in _ROW_MAJOR and result.shape == reshaped[0]:
        names = reshaped[1]
    scale, inner = logits.scale, logits.inner
    if scale is None or name in _KEEPS_SCALE:
        if name.startswith(("sub", "__sub", "__isub")) and args[0] is not tensor:
            scale = None
    elif name in _TIMES or (name in _OVER and args[0] is tensor):
        other = next((a for a in args if a is not tensor), None)
        scale = _times(scale, other, over=name in _OVER)
    elif name in ("tanh", "tanh_") and inner is None:
        inner, scale = scale, 1.0
    else:
        scale = None
    return replace(logits, names=names, scale=scale, inner=inner, reshaped=reshaped)


def _reshaped(
    logits: Logits, tensor: Tensor, name: str, result: Tensor
) -> tuple[torch.Size, tuple[str, ...]] | None:
    """The shape and names to go back to, as long as every element keeps its place in row-major order."""
    if name in _ROW_MAJOR:
        return (tensor.shape, logits.names) if all(logits.names) else logits.reshaped
    return logits.reshaped if result.shape == tensor.shape and name not in _PERMUTES else None


def _name_of(func: Callable[..., Any]) -> str:
    return str(getattr(func, "__name__", "")).partition(".")[0]


def _times(scale: Scale, other: object, over: bool) -> Scale | None:
    if isinstance(other, Tensor):
        if other.numel() == 1:
            other = other.detach().reshape(())
        elif other.dim() >= 2 and other.shape[-2:].numel() == 1:
            other = other.detach()
        else:
            return None
    elif not isinstance(other, (int, float)):
        return None
    if isinstance(scale, float) and scale == 1.0 and not over:
        return other if isinstance(other, Tensor) else float(other)  # as it is: compiled code can be given it
    return scale / other if over else scale * other


def _names_after(
    names: tuple[str, ...], tensor: Tensor, func: Callable[..., Any], result: Tensor
) -> tuple[str, ...]:
    """The names of the result's dimensions: by memory for a view, else by position."""
    if result is tensor:
        return names
    identity = storage_of(tensor)
    if identity is not None and storage_of(result) == identity:
        if result.shape == tensor.shape and result.stride() == tensor.stride():
            return names
        return _names_of_view(names, tensor, result)
    if _name_of(func) in _RESHAPES | _PERMUTES and result.dim() != tensor.dim():
        same = result.shape[-2:] == tensor.shape[-2:]
        return (*[""] * (result.dim() - 2), *names[-2:]) if same else ("",) * result.dim()
    missing = result.dim() - len(names)
    return (*[""] * missing, *names) if missing >= 0 else ("",) * result.dim()


def _names_of_view(names: tuple[str, ...], tensor: Tensor, result: Tensor) -> tuple[str, ...]:
    places = dict(zip(zip(tensor.shape, tensor.stride(), strict=True), names, strict=True))
    found = [
        places.get((n, s), "") if n > 1 else "" for n, s in zip(result.shape, result.stride(), strict=True)
    ]
    for i in range(
        -1, -1 - min(len(found), len(names)), -1
    ):  # dimensions of size 1 have no stride to speak of
        if result.shape[i] == 1 == tensor.shape[i] and names[i] not in found:
            found[i] = names[i]
    return tuple(found)

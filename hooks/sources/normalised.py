"""Source: hand-written attention without a softmax: weights made from q·k by relu, sigmoid, squares or exp.

A product is taken for attention when one operand was made, element by element and through one of these
functions, from a product of two activations, and it sums over what only one of them has. Gates, routers and
MLPs are not: their values come from a weight.

Rows that sum to one are distributions. Others are divided by their sums, which the table says: "relu
(normalised)". `exp` over its own sum is a softmax, and is read as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_monitor.hooks import products
from entropy_monitor.hooks.calls import Seen
from entropy_monitor.hooks.lineage import tensors_in
from entropy_monitor.hooks.logits import Logits
from entropy_monitor.hooks.notes import Notes
from entropy_monitor.hooks.site import Site
from entropy_monitor.hooks.sources import softmax
from entropy_monitor.hooks.trace import Trace

NAME = "matmul"
GIVES_WEIGHTS = False
FUNCTIONS = ()  # any product may be one: `Activations` tells

_KINDS = {
    "relu": "relu",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "softplus": "softplus",
    "exp": "exp",
    "exp2": "exp",
}
_SQUARES = frozenset({"square", "pow", "__pow__"})
_AT_LEAST = frozenset({"clamp", "clamp_min", "clip"})
_MINUS = frozenset({"sub", "__sub__", "subtract"})
_HIDING = frozenset(
    {"masked_fill", "where", "_where", "tril", "triu", "mul", "multiply", "__mul__", "__rmul__", "__imul__"}
)
_OVER = frozenset({"div", "divide", "true_divide", "__truediv__", "__itruediv__", "normalize"})
_PERMUTES = frozenset(
    {"transpose", "permute", "movedim", "swapaxes", "moveaxis", "swapdims", "adjoint", "__get__", "t"}
)
_TOLERANCE = 1e-3  # of a row's sum: an epsilon in the denominator
_TOLERANCE_LOW = 3e-2  # bf16 and fp16


@dataclass(eq=False)
class _Weights:
    """What is known of a tensor of attention weights.

    Attributes:
        kind: the function that made them.
        logits: what it was given, -inf where weights were masked since; same shape as the weights. None once
            they were read: nothing is kept longer than that.
        made: how that was made of q·k.
        chain: what is known of the tensors on the way, to let go of.
        divided: whether they were multiplied or divided by another tensor, perhaps by their sums.
        undropped: the weights as they were before dropout; None where there was none.
    """

    kind: str
    logits: Tensor | None
    made: Logits
    chain: list[_Weights]
    divided: bool = False
    undropped: Tensor | None = None


class Attended(NamedTuple):
    """Weights that are about to be multiplied with values: the arguments of `read`.

    Attributes:
        kind: the function that made them.
        logits: what it was given, -inf where weights were masked since; same shape as the weights.
        weights: as they were before dropout.
        dim: their dimension that runs over keys.
        made: how the logits were made of q·k.
        divided: whether they were multiplied or divided by another tensor, perhaps by their sums.
        values: the values.
        size: elements of the product.
    """

    kind: str
    logits: Tensor
    weights: Tensor
    dim: int
    made: Logits
    divided: bool
    values: Tensor
    size: int


class Activations:
    """Follows weights from the function that made them to the product with values.

    Args:
        trace: of the forward.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._weights = Notes[_Weights]()
        self._unshifted = Notes[Tensor]()

    def ran(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> Attended | None:
        """Take note of a function that ran, before the trace does; say what it attended with, if it did.

        Args:
            func: the function.
            args: of the call.
            kwargs: of the call.
            result: what it returned.
        """
        if result.dim() < 2:
            return None
        if func in products.FUNCTIONS:
            return self._product(func, args, kwargs, result) if self._weights else None
        name = str(getattr(func, "__name__", "")).partition(".")[0]
        name = name if name.startswith("__") else name.rstrip("_")
        operands = [
            t for t in tensors_in((*args, *kwargs.values())) if t is not result or (args and t is args[0])
        ]
        for tensor in operands:
            known = self._weights.get(tensor)
            if known is not None and tensor.numel() == result.numel() and known.logits is not None:
                followed = _followed(known, known.logits, tensor, func, name, args, kwargs, result)
                known.chain.append(followed)
                self._weights.put(result, followed)
                return None
        if operands:
            self._made(name, args, kwargs, operands[0], result)
        return None

    def _made(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor, result: Tensor
    ) -> None:
        """Weights, or logits shifted by a figure of each row, such as their maximum."""
        logits = self._trace.logits_of(tensor)
        if logits is None or result.shape != tensor.shape or tensor.numel() != _size(logits):
            return
        kind = _KINDS.get(name)
        if name in _AT_LEAST and _least(args, kwargs) == 0:
            kind = "relu"
        elif name in _SQUARES and (name == "square" or (len(args) > 1 and args[1] in (2, 4))):
            kind = "square"
        if kind is not None:
            in_place = result is tensor
            source = _inverse(kind, result) if in_place else self._unshifted.get(tensor)
            made = _Weights(kind, tensor if source is None else source, logits, [])
            made.chain.append(made)
            self._weights.put(result, made)
        elif name in _MINUS and result is not tensor and _is_of_rows(args[1], tensor, logits):
            self._unshifted.put(result, tensor)

    def _product(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> Attended | None:
        args = (*args, *(v for name, v in kwargs.items() if isinstance(v, Tensor) and name != "out"))
        contraction = products.contraction_of(func, args)
        if contraction is None:
            return None
        left = (contraction.left, contraction.left_names, contraction.right)
        right = (contraction.right, contraction.right_names, contraction.left)
        for maps, names, values in (left, right):
            known, logits = self._weights.get(maps), self._trace.logits_of(maps)
            if known is None or logits is None or known.logits is None or known.logits.shape != maps.shape:
                continue
            dim = names.index(contraction.contracted)
            if self._trace.logits_of(values) is None and softmax.is_over_keys(dim, logits):
                made = replace(logits, scale=known.made.scale, inner=known.made.inner)
                weights = maps if known.undropped is None else known.undropped
                attended = Attended(
                    known.kind, known.logits, weights, dim, made, known.divided, values, result.numel()
                )
                for each in known.chain:
                    each.logits = each.undropped = None
                return attended
        return None


def read(args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> Seen | None:  # noqa: ARG001
    """What was attended with; `args` are the fields of `Attended`. See `sources.Source`."""
    a = Attended(*args)
    seen = softmax.read_product(a.logits, a.dim, a.made, site)
    arranged = softmax.read_product(a.weights, a.dim, a.made, site).logits
    seen = replace(seen, source=NAME, value=a.values, output_size=a.size)
    sums_to_one = a.divided and arranged is not None and _sums_to_one(a.kind, arranged, site)
    if a.kind == "exp" and sums_to_one:
        return seen
    label = a.kind if sums_to_one else f"{a.kind} (normalised)"
    return replace(seen, weights=arranged, attention=label)


def _sums_to_one(kind: str, weights: Tensor, site: Site) -> bool:
    """Whether all rows that are not empty do. Waits for the device, once for each kind and head count."""

    def look() -> bool:
        total = weights.detach().float().sum(-1)
        low = torch.finfo(weights.dtype).bits < 32
        near = (total - 1).abs() < (_TOLERANCE_LOW if low else _TOLERANCE)
        return bool((near | (total == 0)).all())

    return bool(site.settle(("sums to one", kind, weights.shape[1], weights.dtype), look))


def _followed(
    known: _Weights,
    logits: Tensor,
    tensor: Tensor,
    func: Callable[..., Any],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Tensor,
) -> _Weights:
    """What is known of `result`, which `func` made from weights and perhaps other arguments."""

    def again(other: Tensor) -> Tensor:
        made: Tensor = func(*(other if a is tensor else a for a in args), **kwargs)
        return made

    if result.shape != tensor.shape or name in _PERMUTES:
        undropped = None if known.undropped is None else again(known.undropped)
        return replace(known, logits=again(logits), undropped=undropped)
    if "dropout" in name:
        return replace(known, undropped=tensor if known.undropped is None else known.undropped)
    others = [t for t in tensors_in(args) if t is not tensor and t.numel() > 1]
    if name in _OVER:
        return replace(known, divided=known.divided or bool(others) or name == "normalize")
    if name in _HIDING and (others or name in ("tril", "triu")):
        ones = torch.ones_like(tensor if result is not tensor else result)
        hidden = logits.masked_fill(again(ones) == 0, -torch.inf)
        return replace(known, logits=hidden, divided=known.divided or "mul" in name)
    return known


def _size(logits: Logits) -> int:
    """Elements of the product that logits were made from: sums and maxima of rows have fewer."""
    c = logits.contraction
    sizes = dict(zip(c.left_names, c.left.shape, strict=True))
    for name, size in zip(c.right_names, c.right.shape, strict=True):
        sizes[name] = max(size, sizes.get(name, 1))
    return math.prod(sizes[name] for name in c.out)


def _least(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("min")


def _inverse(kind: str, weights: Tensor) -> Tensor:
    """What weights were made from that were written over it; of relu only what was above 0."""
    if kind == "sigmoid":
        return weights.logit()
    return weights.log() if kind == "exp" else weights.clone()


def _is_of_rows(other: Any, tensor: Tensor, logits: Logits) -> bool:
    """Whether a tensor has one figure for each row of logits."""
    if not isinstance(other, Tensor) or other.dim() != tensor.dim():
        return False
    differ = [d for d in range(tensor.dim()) if other.shape[d] != tensor.shape[d]]
    return len(differ) == 1 and other.shape[differ[0]] == 1 and softmax.is_over_keys(differ[0], logits)

"""What is known inside one module's forward: the linear maps that ran, and the products that became logits."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from entropy_monitor.hooks.linears import LinearCall
from entropy_monitor.hooks.products import Product

N = TypeVar("N")

_TORCH_MODULES = "torch.nn.modules."
_CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers (Linear, Softmax, Dropout, …), which own no attention."""
    if isinstance(module, _CONTAINERS):
        return False
    return any(
        c.__module__.startswith(_TORCH_MODULES) for c in type(module).__mro__[:-1] if c is not nn.Module
    )


class _Notes(Generic[N]):
    """Notes on tensors, that keep no tensor alive."""

    def __init__(self) -> None:
        self._notes: dict[int, tuple[weakref.ref[Tensor], N]] = {}

    def __bool__(self) -> bool:
        return bool(self._notes)

    def put(self, tensor: Tensor, note: N) -> None:
        self._notes[id(tensor)] = (weakref.ref(tensor), note)

    def get(self, tensor: Tensor) -> N | None:
        entry = self._notes.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None


@dataclass
class Scope:
    """The forward of one module that is no torch layer.

    Attributes:
        module: whose forward it is.
        linears: linear maps that ran in it, in order.
    """

    module: nn.Module
    linears: list[LinearCall] = field(default_factory=list)
    _products: _Notes[Product] = field(default_factory=lambda: _Notes[Product]())
    _weights: _Notes[str] = field(default_factory=lambda: _Notes[str]())

    def note_product(self, result: Tensor, product: Product) -> None:
        """Remember that `result` comes from `product`."""
        self._products.put(result, product)

    def product_of(self, tensor: Tensor) -> Product | None:
        """The product that `tensor` was computed from, if any."""
        return self._products.get(tensor)

    def note_weights(self, maps: Tensor, layer: str) -> None:
        """Remember that `maps` are a layer's attention weights."""
        self._weights.put(maps, layer)

    def weights_in(self, args: Iterable[Any]) -> tuple[str, Tensor] | None:
        """If attention weights are among the arguments of a product: their layer, and the other operand."""
        tensors = [a for a in args if isinstance(a, Tensor)]
        if len(tensors) != 2:
            return None
        for maps, other in (tensors, tensors[::-1]):
            layer = self._weights.get(maps)
            if layer is not None:
                return layer, other
        return None

    def follow(self, args: Iterable[Any], result: Tensor) -> None:
        """What is computed from logits or attention weights is taken for the same: scaled, masked, dropped out."""
        if result.dim() < 2 or not (self._products or self._weights):
            return
        for tensor in (a for a in args if isinstance(a, Tensor)):
            if (product := self._products.get(tensor)) is not None:
                self._products.put(result, product)
            if (layer := self._weights.get(tensor)) is not None:
                self._weights.put(result, layer)

    def hand_over(self, parent: Scope) -> None:
        """At the end of the forward: leave the linear maps to the caller's scope.

        A module without children (a projection of the user's own) leaves them as they are; a larger one must
        not keep its activations alive.
        """
        for linear in self.linears:
            if next(self.module.children(), None) is not None:
                linear.release()
            parent.linears.append(linear)

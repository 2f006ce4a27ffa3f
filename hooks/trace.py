"""What is known of the tensors of one forward: origins, products that become logits, attention weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from entropy_monitor.hooks import products
from entropy_monitor.hooks.lineage import Lineage, tensors_in
from entropy_monitor.hooks.linears import LinearCall, linear_call
from entropy_monitor.hooks.logits import Logits, follow_logits
from entropy_monitor.hooks.notes import Notes
from entropy_monitor.hooks.scope import Scope


@dataclass(frozen=True)
class Weighted:
    """Attention weights were multiplied with values.

    Attributes:
        layer: whose weights.
        values: the other operand.
        size: elements of the result.
    """

    layer: str
    values: Tensor
    size: int


class Trace:
    """Follows tensors from function to function, without keeping them alive.

    Args:
        settled: see `Lineage`.
    """

    def __init__(self, settled: dict[Hashable, Any]) -> None:
        self.lineage = Lineage(settled)
        self._logits = Notes[Logits]()
        self._weights = Notes[str]()

    def logits_of(self, tensor: Tensor) -> Logits | None:
        """The product that a tensor was made from, if any."""
        return self._logits.get(tensor)

    def note_weights(self, maps: Tensor, layer: str) -> None:
        """Remember that `maps` are a layer's attention weights."""
        self._weights.put(maps, layer)

    def ran(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor,
        scope: Scope,
        module: nn.Module,
    ) -> LinearCall | Weighted | None:
        """Take note of a function that ran, and say what it was."""
        found = linear_call(func, args, kwargs, result, scope, module)
        if found is not None:
            linear, features = found
            scope.linears.append(linear)
            self.lineage.add(linear, features, result)
            return linear
        args = (*args, *(v for name, v in kwargs.items() if isinstance(v, Tensor) and name != "out"))
        if func in products.FUNCTIONS:
            return self._product(func, args, kwargs, result)
        self._follow(func, args, result)
        return None

    def _product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> Weighted | None:
        contraction = products.contraction_of(func, args)
        if contraction is None or len(contraction.out) != result.dim():
            return None
        pair = (contraction.left, contraction.right)
        for maps, values in (pair, pair[::-1]):
            layer = self._weights.get(maps)
            if layer is not None:
                return Weighted(layer, values, result.numel())
        if products.is_attention_product(contraction):
            origins = (self.lineage.origin_of(pair[0]), self.lineage.origin_of(pair[1]))
            scale = kwargs.get("alpha", 1.0)  # of baddbmm
            self._logits.put(result, Logits(contraction, origins, tuple(contraction.out), scale))
        else:
            self._follow(func, args, result)  # logits that heads talk over
        return None

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], result: Tensor) -> None:
        self.lineage.follow(func, args, result)
        if result.dim() < 2 or not (self._logits or self._weights):
            return
        for tensor in tensors_in(args):
            logits = self._logits.get(tensor)
            if logits is not None:
                self._logits.put(result, follow_logits(logits, tensor, func, args, result))
                return
            layer = self._weights.get(tensor)
            if layer is not None:
                self._weights.put(result, layer)
                return

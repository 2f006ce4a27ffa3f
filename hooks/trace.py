"""What is known of the tensors of one forward: origins, products that become logits, attention weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from entropy_monitor.hooks import products
from entropy_monitor.hooks.arithmetic import JOINS, SUMS
from entropy_monitor.hooks.lineage import Lineage, is_latent, tensors_in
from entropy_monitor.hooks.linears import LinearCall, linear_call
from entropy_monitor.hooks.logits import Logits, follow_logits
from entropy_monitor.hooks.notes import Notes
from entropy_monitor.hooks.scope import Scope, is_leaf


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
        self._outputs = Notes[str]()

    def logits_of(self, tensor: Tensor) -> Logits | None:
        """The product that a tensor was made from, if any."""
        return self._logits.get(tensor)

    def note_weights(self, maps: Tensor, layer: str) -> None:
        """Remember that `maps` are a layer's attention weights."""
        self._weights.put(maps, layer)

    def note_output(self, output: Tensor, layer: str) -> None:
        """Remember that `output` is what a layer's attention gives."""
        self._outputs.put(output, layer)

    def output_of(self, tensor: Tensor) -> str | None:
        """The layer whose attention gave this, element by element; None if there is none."""
        return self._outputs.get(tensor)

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
            linear.home = _home(scope)
            linear.home.linears.append(linear)
            x = linear.input
            inner = None if x is None else self.lineage.origin_of(x)
            if is_latent(linear, inner):
                linear.latent = inner
            self.lineage.add(linear, features, result)
            return linear
        args = (*args, *(v for name, v in kwargs.items() if isinstance(v, Tensor) and name != "out"))
        if func in products.FUNCTIONS:
            return self._product(func, args, kwargs, result)
        return self._follow(func, args, result, scope, module)

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

    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        result: Tensor,
        scope: Scope | None = None,
        module: nn.Module | None = None,
    ) -> LinearCall | None:
        linear = self.lineage.follow(func, args, result, scope, module)
        if linear is not None:
            linear.home = _home(linear.scope)
            _keep_inputs(linear)
            return linear
        if self._outputs:
            self._follow_output(func, args, result)
        if result.dim() < 2 or not (self._logits or self._weights):
            return None
        for tensor in tensors_in(args):
            logits = self._logits.get(tensor)
            if logits is not None:
                self._logits.put(result, follow_logits(logits, tensor, func, args, result))
                return None
            layer = self._weights.get(tensor)
            if layer is not None:
                self._weights.put(result, layer)
                return None
        return None

    def _follow_output(self, func: Callable[..., Any], args: tuple[Any, ...], result: Tensor) -> None:
        """Reshaped, gated, normed, cast: still the attention's; a sum with something else is not."""
        name = str(getattr(func, "__name__", "")).partition(".")[0]
        for tensor in tensors_in(args):
            layer = self._outputs.get(tensor)
            if layer is not None and (
                name in JOINS or (name not in SUMS and result.numel() == tensor.numel())
            ):
                self._outputs.put(result, layer)
                return


def _home(scope: Scope) -> Scope:
    """The forward that uses what a projection of the user's own makes: a linear layer, perhaps adapted."""
    while scope.parent is not None and _is_projection(scope.module):
        scope = scope.parent
    return scope


def _is_projection(module: nn.Module) -> bool:
    if next(module.children(), None) is None:
        return True
    if not hasattr(module, "in_features"):
        return False
    parts = (m for m in module.modules() if m is not module)
    return all(is_leaf(m) or next(m.children(), None) is None for m in parts)


def _keep_inputs(linear: LinearCall) -> None:
    """Keep what a sum of maps was applied to until the forward around ends: the maps make one projection."""
    home = linear.home
    if home is linear.scope and home.parent is not None:
        home = home.parent
    home.linears.append(linear)
    for scope in {linear.scope, linear.home} - {home}:
        home.linears += scope.linears
        scope.linears = []

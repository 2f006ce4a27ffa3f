"""Sees every attention call of a model, while it is armed, and says whose it is.

While armed, two global module hooks keep the stack of running modules, and a `TorchFunctionMode` that lives only
within a watched forward sees every torch function, whatever name it was bound to. Nothing is left on the model:
copying, pickling, saving or compiling it meets no trace, and a disarmed watcher costs nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from entropy_monitor.guard import Guard
from entropy_monitor.hooks import linears as linear_maps
from entropy_monitor.hooks import multihead, products, sdpa, softmax
from entropy_monitor.hooks.calls import AttentionCall, Role, Seen
from entropy_monitor.hooks.names import module_names
from entropy_monitor.hooks.ownership import Ownership, declared_heads
from entropy_monitor.hooks.projections import Projection
from entropy_monitor.hooks.scope import Scope, is_leaf

_PART = "reading attention"


class Receiver(Protocol):
    """What is told of each attention call, inside the forward, without gradients."""

    def attention(self, call: AttentionCall) -> None:
        """One attention call, before the function itself runs."""

    def projection(self, layer: str, role: Role, projection: Projection) -> None:
        """W_V or W_O of a layer, as soon as it is known."""


@dataclass
class Sightings:
    """What was seen and not measured: for the error that a model without attention gets."""

    measured: int = 0
    forwards: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    rejected: dict[str, str] = field(default_factory=dict)


@dataclass
class _Awaited:
    """An attention output whose projection is still to come."""

    layer: str
    elements: int


class _Forward(threading.local):
    """The watched forward that runs on this thread."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.scopes: list[Scope] = []
        self.mode: _Interceptor | None = None
        self.calls: Counter[str] = Counter()
        self.awaited: _Awaited | None = None


class _Interceptor(TorchFunctionMode):
    def __init__(self, see: Callable[..., Any]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._see(func, args, kwargs or {})


class Watcher:
    """Watches a model's attention.

    Args:
        model: whose attention; modules that it gains later are not seen.
        receiver: is told of each call.
        guard: keeps faults of the watching from the watched.
        owners: name patterns (`blocks.*.attn`) of modules in which every softmax counts as attention.
        training_only: leave out forwards without gradients or in eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        receiver: Receiver,
        guard: Guard,
        *,
        owners: Sequence[str] = (),
        training_only: bool = False,
    ) -> None:
        self.names = module_names(model)
        self.sightings = Sightings()
        self._receiver = receiver
        self._guard = guard
        self._patterns = tuple(owners)
        self._training_only = training_only
        self._ownership = Ownership(self.names)
        self._leaves = {module for module in self.names if is_leaf(module)}
        self._handles: list[RemovableHandle] = []
        self._forward = _Forward()

    @property
    def armed(self) -> bool:
        """Whether forwards are being watched."""
        return bool(self._handles)

    def arm(self) -> None:
        """Watch from the next forward on."""
        if not self.armed:
            self._handles = [
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ]

    def disarm(self) -> None:
        """Stop watching, and leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- module hooks --------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        if torch.compiler.is_compiling() or module not in self.names:
            return
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed forward that runs again inside backward: already read
        forward = self._forward
        if not forward.modules:
            self._begin(module)
        forward.modules.append(module)
        if forward.mode is not None and module not in self._leaves:
            forward.scopes.append(Scope(module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        if torch.compiler.is_compiling():
            return
        forward = self._forward
        if not forward.modules or forward.modules[-1] is not module:
            return
        forward.modules.pop()
        if forward.mode is not None and module not in self._leaves:
            scope = forward.scopes.pop()
            if forward.scopes:
                scope.hand_over(forward.scopes[-1])
        if not forward.modules:
            self._end()

    def _begin(self, module: nn.Module) -> None:
        self.sightings.forwards += 1
        if self._training_only and not torch.is_grad_enabled():
            self.sightings.skipped["without gradients (torch.no_grad)"] += 1
            return
        if self._training_only and not module.training:
            self.sightings.skipped["in eval mode"] += 1
            return
        forward = self._forward
        forward.calls.clear()
        forward.mode = _Interceptor(self._see)
        forward.mode.__enter__()
        if module in self._leaves:
            forward.scopes.append(Scope(module))

    def _end(self) -> None:
        forward = self._forward
        forward.scopes.clear()
        forward.awaited = None
        if forward.mode is not None:
            forward.mode.__exit__(None, None, None)
            forward.mode = None

    # -- torch functions -----------------------------------------------------------------------------------------

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one torch function of the watched forward, reading what it says of attention."""
        before = _BEFORE.get(func)
        if before is not None:
            self._guard.run(_PART, self._read_before, before, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and self._forward.scopes:
            self._guard.run(_PART, self._read_after, func, args, kwargs, result)
        return result

    @torch.no_grad()
    def _read_before(self, source: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Attention itself, before it runs: it may work in place."""
        scopes = self._forward.scopes
        if not scopes:
            return
        if source == sdpa.NAME:
            seen = sdpa.read(args, kwargs, declared_heads(scopes))
        elif source == multihead.NAME:
            seen = multihead.read(args, kwargs)
        else:
            seen = self._read_softmax(args, kwargs)
        if seen is not None:
            self._emit(seen)

    def _read_softmax(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Seen | None:
        found = softmax.logits_of(args, kwargs)
        if found is None:
            return None
        logits, dim = found
        scopes = self._forward.scopes
        product = next((p for s in reversed(scopes) if (p := s.product_of(logits))), None)
        if product is None and not self._named_by_hand():
            layer = self.names[scopes[-1].module]
            self.sightings.rejected[layer] = (
                f"softmax of shape {list(logits.shape)} over dimension {dim}: "
                "its logits are no product of two activations"
            )
            return None
        heads = declared_heads(scopes)
        folded = product is not None and self._ownership.is_folded(product.q, scopes, heads)
        return softmax.read(logits, dim, product, heads, folded)

    def _named_by_hand(self) -> bool:
        return any(
            fnmatchcase(self.names[scope.module], pattern)
            for scope in self._forward.scopes
            for pattern in self._patterns
        )

    def _emit(self, seen: Seen) -> None:
        forward = self._forward
        owner, found = self._ownership.resolve(seen, forward.scopes, forward.calls)
        layer = self.names[owner]
        call = forward.calls[layer]
        forward.calls[layer] += 1
        self.sightings.measured += 1
        self._receiver.attention(
            AttentionCall(
                layer,
                call,
                seen.source,
                seen.inputs,
                seen.logits,
                found.get("query"),
                found.get("key"),
                seen.extra_keys,
            )
        )
        for role in ("value", "output"):
            if role in found:
                self._receiver.projection(layer, role, found[role])
        if "output" not in found:
            forward.awaited = _Awaited(layer, seen.output_size)

    @torch.no_grad()
    def _read_after(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        """What a function made: a linear map's output, a product, or something computed from a product."""
        forward = self._forward
        scope = forward.scopes[-1]
        if _BEFORE.get(func) == softmax.NAME:
            self._note_weights(result)
            return
        linear = linear_maps.linear_call(func, args, kwargs, result, forward.modules[-1])
        if linear is not None:
            scope.linears.append(linear)
            self._maybe_output(linear)
            return
        if func in products.FUNCTIONS:
            if self._maybe_value(args, result):
                return
            product = products.product_of(func, args)
            if product is not None:
                scope.note_product(result, product)
                return
        for owner in forward.scopes[-2:]:
            owner.follow(args, result)

    def _note_weights(self, result: Tensor) -> None:
        awaited = self._forward.awaited
        if awaited is not None and awaited.elements == 0:
            self._forward.scopes[-1].note_weights(result, awaited.layer)

    def _maybe_value(self, args: tuple[Any, ...], result: Tensor) -> bool:
        """Whether a product is attention weights times values; then its operand tells W_V."""
        for scope in self._forward.scopes[-2:]:
            hit = scope.weights_in(args)
            if hit is None:
                continue
            layer, values = hit
            if self._forward.awaited is not None and self._forward.awaited.layer == layer:
                self._forward.awaited.elements = result.numel()
            projection = self._ownership.value_projection(values, self._forward.scopes)
            if projection is not None:
                self._receiver.projection(layer, "value", projection)
            return True
        return False

    def _maybe_output(self, linear: linear_maps.LinearCall) -> None:
        """The first linear map of an attention's output is its W_O."""
        awaited = self._forward.awaited
        x = linear.input
        if awaited is None or x is None or x.numel() != awaited.elements:
            return
        self._forward.awaited = None
        self._receiver.projection(awaited.layer, "output", linear.whole())


_BEFORE: dict[Any, str] = {
    **dict.fromkeys(sdpa.FUNCTIONS, sdpa.NAME),
    **dict.fromkeys(multihead.FUNCTIONS, multihead.NAME),
    **dict.fromkeys(softmax.FUNCTIONS, softmax.NAME),
}

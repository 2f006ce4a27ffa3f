"""Sees every attention call of a model, while it is armed, and says whose it is.

While armed, two global module hooks keep the stack of running modules, and a `TorchFunctionMode` that
lives only within a watched forward sees every torch function, whatever name it was bound to. Nothing is
left on the model: copying, pickling, saving or compiling it meets no trace, and a disarmed watcher costs
nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from entropy_monitor.guard import Guard
from entropy_monitor.hooks.names import module_names
from entropy_monitor.hooks.observer import Observer, Receiver, Sightings
from entropy_monitor.hooks.scope import is_leaf
from entropy_monitor.hooks.sources import ATTENTION
from entropy_monitor.hooks.structure import is_compiled

_FOLLOWING = "following the forward"
_READING = "reading attention"


class _Forward(threading.local):
    """The watched forward that runs on this thread."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.mode: _Interceptor | None = None
        self.observer: Observer | None = None
        self.compiled: nn.Module | None = None


class _Interceptor(TorchFunctionMode):
    def __init__(self, see: Callable[..., Any]) -> None:
        super().__init__()
        self._see = see

    def on(self) -> None:
        """See the functions of this thread from now on."""
        self.__enter__()  # type: ignore[no-untyped-call]

    def off(self) -> None:
        """See them no longer."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

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
        self._leaves = {module for module in self.names if is_leaf(module)}
        self._handles: list[RemovableHandle] = []
        self._settled: dict[Hashable, Any] = {}
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
        self._end()  # of a forward that an interrupt left without its hooks

    def _enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        if torch.compiler.is_compiling() or module not in self.names:
            return
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed forward that runs again inside backward: already read
        self._guard.run(_FOLLOWING, self._entered, module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        if not torch.compiler.is_compiling():
            self._guard.run(_FOLLOWING, self._left, module)

    def _entered(self, module: nn.Module) -> None:
        forward = self._forward
        if forward.compiled is not None:
            return
        if forward.modules and forward.modules[0] is module:
            self._end()  # an interrupt left the last forward without its hooks
        if not forward.modules:
            self._begin(module)
        forward.modules.append(module)
        if is_compiled(module):
            self._suspend(module)
        elif forward.observer is not None and module not in self._leaves:
            self._guard.run(_READING, forward.observer.enter, module)

    def _left(self, module: nn.Module) -> None:
        forward = self._forward
        if not forward.modules or forward.modules[-1] is not module:
            return
        if forward.compiled is not None and forward.compiled is not module:
            return
        forward.modules.pop()
        if forward.compiled is module:
            self._resume()
        elif forward.observer is not None and module not in self._leaves:
            self._guard.run(_READING, forward.observer.leave)
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
        forward.observer = self._guard.run(_READING, self._observer)
        if forward.observer is None:
            return
        if module in self._leaves:
            self._guard.run(_READING, forward.observer.enter, module)
        forward.mode = _Interceptor(self._see)
        forward.mode.on()

    def _observer(self) -> Observer:
        return Observer(
            self.names, self._receiver, self._guard, self.sightings, self._patterns, self._settled
        )

    def _suspend(self, module: nn.Module) -> None:
        """Leave compiled code alone: it shows no functions, and a mode would make it compile anew."""
        forward = self._forward
        forward.compiled = module
        if forward.mode is not None:
            forward.mode.off()

    def _resume(self) -> None:
        forward = self._forward
        forward.compiled = None
        if forward.mode is not None:
            forward.mode.on()

    def _end(self) -> None:
        forward = self._forward
        if forward.mode is not None and forward.compiled is None:
            forward.mode.off()
        forward.modules.clear()
        forward.mode = forward.observer = forward.compiled = None

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one torch function of the watched forward, showing it to the observer."""
        observer = self._forward.observer
        if torch.compiler.is_compiling() or observer is None or not observer.scopes:
            return func(*args, **kwargs)
        if func in ATTENTION:
            self._guard.run(_READING, observer.before, func, args, kwargs)
        result = func(*args, **kwargs)
        module = self._forward.modules[-1]
        for part in result if type(result) in (tuple, list) else (result,):
            if isinstance(part, Tensor):
                self._guard.run(_READING, observer.after, func, args, kwargs, part, module)
        return result

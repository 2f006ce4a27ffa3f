"""Sees every attention call of a model, while it is armed, and says whose it is.

While armed, two global module hooks keep the stack of running modules, and a `TorchFunctionMode` that
lives only within a watched forward sees every torch function, whatever name it was bound to. Nothing is
left on the model: copying, pickling, saving or compiling it meets no trace, and a disarmed watcher costs
nothing.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.hooks import RemovableHandle

from entropy_monitor.guard import Guard
from entropy_monitor.hooks.compiled.reader import CompiledReader
from entropy_monitor.hooks.names import module_names
from entropy_monitor.hooks.observer import Observer, Receiver, Sightings
from entropy_monitor.hooks.scope import is_leaf
from entropy_monitor.hooks.sources import ATTENTION, python_functions
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


class _Gate:
    """Stands before a module compiled in place (`module.compile()`), around whose call no hook runs."""

    def __init__(
        self, module: nn.Module, enter: Callable[[nn.Module], None], leave: Callable[[nn.Module], None]
    ) -> None:
        self._module = module
        self._call: Callable[..., Any] = module._compiled_call_impl  # type: ignore[assignment]
        self._enter, self._leave = enter, leave
        module._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._enter(self._module)
        try:
            return self._call(*args, **kwargs)
        finally:
            self._leave(self._module)

    def open(self) -> None:
        """Leave the module as it was."""
        if self._module._compiled_call_impl is self:
            self._module._compiled_call_impl = self._call


def _compiled_in_place(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


@functools.cache
def ignore_warning_of_global_hooks() -> None:
    """Torch warns of global hooks at every call of a compiled module; ours do nothing that it warns of."""
    warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")


class _Interceptor(TorchFunctionMode):
    def __init__(self, see: Callable[..., Any], called: Callable[..., None]) -> None:
        super().__init__()
        self._see = see
        self._called = called
        self._undo: Callable[[], None] | None = None

    def on(self) -> None:
        """See the functions of this thread from now on."""
        self._undo = python_functions.install(self._python_function)
        self.__enter__()  # type: ignore[no-untyped-call]

    def off(self) -> None:
        """See them no longer."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _python_function(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Any], None] | None:
        """One of attention's own is called: what runs in it is not seen, nor compiled anew for being seen."""
        self._called(func, args, kwargs)
        if _get_current_function_mode() is not self:  # type: ignore[no-untyped-call]
            return None
        self.__exit__(None, None, None)

        def back(result: Any) -> None:  # noqa: ARG001
            self.__enter__()

        return back

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if python_functions.is_inside():
            return func(*args, **(kwargs or {}))
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
        self._gates: list[_Gate] = []
        self._compiled = CompiledReader(
            self.names,
            receiver,
            guard,
            self.sightings,
            self._patterns,
            self._settled,
            self._count,
            self._skips,
        )

    @property
    def armed(self) -> bool:
        """Whether forwards are being watched."""
        return bool(self._handles)

    def arm(self) -> None:
        """Watch from the next forward on."""
        if self.armed:
            return
        ignore_warning_of_global_hooks()
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        self._compiled.arm()
        self._gates = [_Gate(m, self._suspend, self._resume) for m in self.names if _compiled_in_place(m)]

    def disarm(self) -> None:
        """Stop watching, and leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._compiled.disarm()
        for gate in self._gates:
            gate.open()
        self._gates = []
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
            self._resume(module)
        elif forward.observer is not None and module not in self._leaves:
            self._guard.run(_READING, forward.observer.leave)
        if not forward.modules:
            self._end()

    def _begin(self, module: nn.Module) -> None:
        self.sightings.forwards += 1
        if self._skips(torch.is_grad_enabled(), module.training):
            return
        forward = self._forward
        forward.observer = self._guard.run(_READING, self._observer)
        if forward.observer is None:
            return
        if module in self._leaves:
            self._guard.run(_READING, forward.observer.enter, module)
        forward.mode = _Interceptor(self._see, self._call_python)
        forward.mode.on()

    def _skips(self, gradients: bool, training: bool) -> bool:
        """Whether a forward is left out; noted if so."""
        if not self._training_only or (gradients and training):
            return False
        why = "in eval mode" if gradients else "without gradients (torch.no_grad)"
        self.sightings.skipped[why] += 1
        return True

    def _count(self, layer: str, call: int) -> int:
        """Which call of a layer comes now: counted in the forward around, else as in the compiled graph."""
        observer = self._forward.observer
        return call if observer is None else observer.count(layer)

    def _observer(self) -> Observer:
        return Observer(
            self.names, self._receiver, self._guard, self.sightings, self._patterns, self._settled
        )

    def _suspend(self, module: nn.Module) -> None:
        """Show compiled code no mode, for which it would be compiled anew; it is read by `CompiledReader`."""
        forward = self._forward
        if forward.compiled is not None:
            return
        forward.compiled = module
        if forward.mode is not None:
            forward.mode.off()

    def _resume(self, module: nn.Module) -> None:
        forward = self._forward
        if forward.compiled is not module:
            return
        forward.compiled = None
        if forward.mode is not None:
            forward.mode.on()

    def _end(self) -> None:
        forward = self._forward
        if forward.mode is not None and forward.compiled is None:
            forward.mode.off()
        forward.modules.clear()
        forward.mode = forward.observer = forward.compiled = None

    def _call_python(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A Python function of attention is about to run."""
        observer = self._forward.observer
        if observer is not None and observer.scopes:
            self._guard.run(_READING, observer.before, func, args, kwargs)

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

"""Sees every attention call of a model, while it is armed, and says whose it is.

While armed, two global module hooks keep the stack of running modules, and a `TorchFunctionMode` that
lives only within a watched forward sees every torch function, whatever name it was bound to. Nothing is
left on the model: copying, pickling, saving or compiling it meets no trace, and a disarmed watcher costs
nothing.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from entropy_monitor.guard import Guard
from entropy_monitor.hooks import sharding, transforms
from entropy_monitor.hooks.calls import Receiver
from entropy_monitor.hooks.compiled import switch
from entropy_monitor.hooks.compiled.reader import CompiledReader
from entropy_monitor.hooks.interceptor import Interceptor
from entropy_monitor.hooks.names import module_names
from entropy_monitor.hooks.observer import Observer, Sightings
from entropy_monitor.hooks.recall import Followed, Recall
from entropy_monitor.hooks.scope import is_leaf
from entropy_monitor.hooks.sources import ATTENTION

_FOLLOWING = "following the forward"
_READING = "reading attention"
_MISSES = 3
"""Forwards that were not like those that were followed, after which every one is followed."""


class _Forward(threading.local):
    """The watched forward that runs on this thread."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.islands: list[nn.Module] = []  # those that run eagerly within compiled code
        self.mode: Interceptor | None = None
        self.observer: Observer | Recall | None = None


def ignore_warning_of_global_hooks() -> None:
    """Torch warns of global hooks at every call of a compiled module; ours do nothing that it warns of."""
    message = r"Using `torch\.compile\(module\)` when there are global hooks"
    if not any(f[1] is not None and getattr(f[1], "pattern", f[1]) == message for f in warnings.filters):
        warnings.filterwarnings("ignore", message=message)  # filters come and go with `catch_warnings`


class Watcher:
    """Watches a model's attention.

    Args:
        model: whose attention; modules that it gains later are not seen.
        receiver: is told of each call.
        guard: keeps faults of the watching from the watched.
        owners: name patterns (`blocks.*.attn`) of modules in which every softmax counts as attention.
        training_only: leave out forwards without gradients or in eval mode.

    Attributes:
        rows_alone: whether nothing but rows of attention is wanted: no projections. Forwards like those that
            were followed before are then not followed.
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
        self.rows_alone = False
        self._receiver = receiver
        self._guard = guard
        self._patterns = tuple(owners)
        self._training_only = training_only
        self._leaves = {module for module in self.names if is_leaf(module)}
        self._handles: list[RemovableHandle] = []
        self._settled: dict[Hashable, Any] = {}
        self._followed: dict[nn.Module, Followed] = {}  # by the module whose forward it was
        self._misses = 0
        self._forward = _Forward()
        self._compiled = CompiledReader(
            self.names,
            receiver,
            guard,
            self.sightings,
            self._patterns,
            self._settled,
            self._count,
            self._leaves_out,
            self._entering_compiled,
            self._enter_island,
            self._innermost,
            lambda: self._forward.observer,
            (Watcher._enter, Watcher._leave),
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

    def disarm(self) -> None:
        """Stop watching, and leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._compiled.disarm()
        self._end()  # of a forward that an interrupt left without its hooks

    def _enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        if torch.compiler.is_compiling() or module not in self.names:
            return
        if torch._C._get_tracing_state() is not None:
            return  # torch.jit.trace compares what it sees in two runs
        if torch._C._current_graph_task_id() != -1:
            return  # a checkpointed forward that runs again inside backward: already read
        callback = set_eval_frame(None)  # the compiler goes through what runs within compiled code
        try:
            self._guard.run(_FOLLOWING, self._entered, module, callback is not None and switch.is_on())
        finally:
            set_eval_frame(callback)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        if torch.compiler.is_compiling():
            return
        callback = set_eval_frame(None)
        try:
            self._guard.run(_FOLLOWING, self._left, module)
        finally:
            set_eval_frame(callback)

    def _entered(self, module: nn.Module, compiled: bool) -> None:
        self.sightings.ran.add(self.names[module])
        forward = self._forward
        if forward.modules and forward.modules[0] is module:
            self._end()  # an interrupt left the last forward without its hooks
        if not forward.modules:
            self._begin(module)
            if compiled and forward.mode is not None:
                forward.mode.pause()  # what is not compiled here may be within what is
        forward.modules.append(module)
        if forward.observer is not None and module not in self._leaves:
            self._guard.run(_READING, forward.observer.enter, module)

    def _left(self, module: nn.Module) -> None:
        forward = self._forward
        if not forward.modules or forward.modules[-1] is not module:
            return
        forward.modules.pop()
        if forward.islands and forward.islands[-1] is module:
            forward.islands.pop()
            self._entering_compiled()  # back in the compiled code around
        if forward.observer is not None and module not in self._leaves:
            self._guard.run(_READING, forward.observer.leave)
        if not forward.modules:
            self._guard.run(_READING, self._remember, module, forward.observer)
            self._end()

    def _begin(self, module: nn.Module) -> None:
        self.sightings.forwards += 1
        if transforms.is_inside():
            self.sightings.skipped["inside torch.func (vmap, grad, …)"] += 1
            return
        if self._skips(torch.is_grad_enabled(), module.training):
            return
        forward = self._forward
        forward.observer = self._guard.run(_READING, self._observer, module)
        if forward.observer is None:
            return
        if module in self._leaves:
            self._guard.run(_READING, forward.observer.enter, module)
        forward.mode = Interceptor(self._see, self._call_python)
        forward.mode.on()

    def _remember(self, root: nn.Module, observer: Observer | Recall | None) -> None:
        """Keep what a forward showed, or whether it was like those that were followed."""
        if isinstance(observer, Observer):
            self._followed.setdefault(root, Followed()).add(observer.followed)
        elif observer is not None:
            observer.end()
            self._misses += observer.missed

    def _skips(self, gradients: bool, training: bool) -> bool:
        """Whether a forward is left out; noted if so."""
        if not self._training_only or (gradients and training):
            return False
        why = "in eval mode" if gradients else "without gradients (torch.no_grad)"
        self.sightings.skipped[why] += 1
        return True

    def _leaves_out(self, gradients: bool, training: bool) -> bool:
        """Whether a call in compiled code is left out: the forward around decides, if there is one."""
        forward = self._forward
        return forward.observer is None if forward.modules else self._skips(gradients, training)

    def _count(self, layer: str, call: int) -> int:
        """Which call of a layer comes now: counted in the forward around, else as in the compiled graph."""
        observer = self._forward.observer
        return call if observer is None else observer.count(layer)

    def _observer(self, root: nn.Module) -> Observer | Recall:
        followed = self._followed.get(root)
        if self.rows_alone and self._misses < _MISSES and followed is not None and followed.tells:
            return Recall(followed, self._receiver, self._guard, self._settled)
        return Observer(
            self.names, self._receiver, self._guard, self.sightings, self._patterns, self._settled
        )

    def _entering_compiled(self) -> Callable[[], object] | None:
        """Show compiled code no mode, for which it would be compiled anew; returns what ends that."""
        mode = self._forward.mode
        return None if mode is None else mode.pause()

    def _enter_island(self, module: nn.Module) -> None:
        """See the functions of a forward that is kept from being compiled, until it ends."""
        forward = self._forward
        if forward.mode is not None and self._innermost() is module and forward.mode.go_on():
            forward.islands.append(module)

    def _innermost(self) -> nn.Module | None:
        """The innermost module whose forward runs eagerly."""
        modules = self._forward.modules
        return modules[-1] if modules else None

    def _end(self) -> None:
        forward = self._forward
        if forward.mode is not None:
            forward.mode.off()
        forward.modules.clear()
        forward.islands.clear()
        forward.mode = forward.observer = None

    def _call_python(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A Python function of attention is about to run."""
        observer = self._forward.observer
        if observer is None or not observer.scopes:
            return
        if self._guard.run(_READING, transforms.is_inside_vmap):
            self._guard.run(_READING, observer.reject, transforms.IN_VMAP)
        else:
            self._guard.run(_READING, sharding.show_before, observer, func, args, kwargs)

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one torch function of the watched forward, showing it to the observer."""
        observer = self._forward.observer
        if torch.compiler.is_compiling() or observer is None or not observer.scopes:
            return func(*args, **kwargs)
        if not observer.follows and func not in ATTENTION:
            return func(*args, **kwargs)
        if self._guard.run(_READING, transforms.is_inside_vmap):
            if func in ATTENTION:
                self._guard.run(_READING, observer.reject, transforms.IN_VMAP)
            return func(*args, **kwargs)
        if func in ATTENTION:
            self._guard.run(_READING, sharding.show_before, observer, func, args, kwargs)
        result = func(*args, **kwargs)
        module = self._forward.modules[-1]
        for part in result if type(result) in (tuple, list) else (result,):
            if isinstance(part, Tensor):
                self._guard.run(_READING, sharding.show_after, observer, func, args, kwargs, part, module)
        return result

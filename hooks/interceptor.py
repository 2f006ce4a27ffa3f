"""Sees every torch function of a thread, and the Python functions of attention, while it is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import overrides
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from entropy_monitor.hooks.sources import python_functions


class Interceptor(TorchFunctionMode):
    """A function mode that tells of functions.

    Args:
        see: runs a torch function and returns its result.
        called: is told of a Python function of attention before it runs.
    """

    def __init__(self, see: Callable[..., Any], called: Callable[..., None]) -> None:
        super().__init__()
        self._see = see
        self._called = called
        self._undo: Callable[[], None] | None = None
        self._paused = False
        self._below: list[TorchFunctionMode] = []  # on the stack when this one was put there

    def on(self) -> None:
        """See the functions of this thread from now on."""
        self._undo = python_functions.install(self._python_function)
        self._join_stack()

    def off(self) -> None:
        """See them no longer."""
        if not self._paused:
            self._leave_stack()
        self._paused = False
        if self._undo is not None:
            self._undo()
            self._undo = None

    def _join_stack(self) -> None:
        self._below = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        self.__enter__()  # type: ignore[no-untyped-call]

    def _leave_stack(self) -> None:
        """Take this mode off; an interrupt may have left it below modes of the user's.

        Or above one: its `with` has then taken this mode off in place of its own, which is still there.
        """
        stack = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        theirs = (mode for mode in reversed(stack) if any(mode is other for other in self._below))
        last = self if self in stack else next(theirs, None)
        if last is None:
            return
        above = []
        while (mode := overrides._pop_mode()) is not last:  # type: ignore[no-untyped-call]
            above.append(mode)
        for mode in reversed(above):
            overrides._push_mode(mode)  # type: ignore[no-untyped-call]

    def pause(self) -> Callable[[], object] | None:
        """See no torch function until what is returned is called; None where that cannot be done now."""
        top: object = _get_current_function_mode()  # type: ignore[no-untyped-call]
        if self._paused or top is not self:
            return None
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._paused = True
        return self.go_on

    def go_on(self) -> bool:
        """See torch functions again; returns whether there was a pause."""
        if not self._paused:
            return False
        self._paused = False
        self._join_stack()
        return True

    def _python_function(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[Any], object] | None:
        """One of attention's own is called: what runs in it is not seen, nor compiled anew for being seen."""
        self._called(func, args, kwargs)
        go_on = self.pause()
        return None if go_on is None else lambda _: go_on()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if python_functions.is_inside():
            return func(*args, **(kwargs or {}))
        return self._see(func, args, kwargs or {})

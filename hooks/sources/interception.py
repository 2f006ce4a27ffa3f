"""Shows the calls of Python functions that no torch function mode sees: flash-attn, xformers, FlexAttention.

While installed, a function's code is exchanged for one that tells of the call and then runs the old code. The
function object stays the same, so that every name under which it was imported, and every
`torch.compile(function)` that was made of it, shows its calls too; compiled code is found in its cache as
before, for the function mode is off and the old code is still what runs.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import Any

import torch

Finish = Callable[[Any], object]
See = Callable[[FunctionType, tuple[Any, ...], dict[str, Any]], Finish | None]
"""Told of a call before it runs; what it returns is told of the result, None if the call failed."""

is_compiling = torch.compiler.is_compiling
set_callback = torch._C._dynamo.eval_frame.set_eval_frame


class _Thread(threading.local):
    see: See | None = None
    inside = False
    compiled = False


class _Exchange:
    """A function's old code, and the one that tells of its calls."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self.code = function.__code__
        self.original = FunctionType(
            self.code,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            function.__closure__,
        )
        self.original.__kwdefaults__ = function.__kwdefaults__
        self.telling = _telling(id(function), function)
        self.installed = 0
        self._signs = False

    def install(self) -> None:
        """Have the function tell; whoever asks for its signature gets the old one."""
        if not self.installed:
            _skip(self.telling)
            self._signs = "__signature__" not in vars(self.function)
            if self._signs:
                self.function.__signature__ = inspect.signature(self.function)  # type: ignore[attr-defined]
            self.function.__code__ = self.telling
        self.installed += 1

    def remove(self) -> None:
        """Put the old code back, unless someone else exchanged it since."""
        self.installed -= 1
        if self.installed or self.function.__code__ is not self.telling:
            return
        self.function.__code__ = self.code
        if self._signs:
            vars(self.function).pop("__signature__", None)


_thread = _Thread()
_lock = threading.Lock()
exchanges: dict[int, _Exchange] = {}


def install(functions: Iterable[FunctionType], see: See) -> Callable[[], None]:
    """Tell `see` of this thread's calls of some functions.

    A call within another one is not told of; nor are calls from code that is being compiled.

    Args:
        functions: plain Python functions without free variables.
        see: what to tell.

    Returns:
        What undoes it.
    """
    chosen = [f for f in functions if not f.__code__.co_freevars]
    before, _thread.see = _thread.see, see
    with _lock:
        for function in chosen:
            exchange = exchanges.get(id(function))
            if exchange is None or (not exchange.installed and exchange.code is not function.__code__):
                exchange = exchanges[id(function)] = _Exchange(function)
            exchange.install()

    def undo() -> None:
        _thread.see = before
        with _lock:
            for function in chosen:
                exchanges[id(function)].remove()

    return undo


def is_compiled_call() -> bool:
    """Whether the call that is being told of is one of a function that `torch.compile` made."""
    return _thread.compiled


def original(function: FunctionType) -> FunctionType:
    """A function that was installed, as it was before: with its signature, and telling nobody."""
    return exchanges[id(function)].original


def is_inside() -> bool:
    """Whether a call that was told of is running on this thread."""
    return _thread.inside


def begin(key: int, args: tuple[Any, ...], kwargs: dict[str, Any], callback: object) -> Finish:
    """Called by the exchanged code before the old one runs; `callback` is the compiler's, if any."""
    if _thread.see is None or _thread.inside:
        return _nothing
    _thread.inside, _thread.compiled = True, callable(callback)
    try:
        finish = _thread.see(exchanges[key].function, args, kwargs)
    except BaseException:
        _thread.inside = False
        raise
    finally:
        _thread.compiled = False

    def end(result: Any) -> None:
        _thread.inside = False
        if finish is not None:
            finish(result)

    return end


def _nothing(result: Any) -> None:
    del result


def _template(*args: Any, **kwargs: Any) -> Any:
    """What an exchanged function runs, in the globals of that function. The compiler may inline it."""
    from entropy_monitor.hooks.sources import interception as told

    key = "key"
    if told.is_compiling():
        return told.exchanges[key].original(*args, **kwargs)  # type: ignore[index]
    callback = told.set_callback(None)  # what is run here is none of the compiler's business
    try:
        end = told.begin(key, args, kwargs, callback)  # type: ignore[arg-type]
        run = told.exchanges[key].original  # type: ignore[index]
    finally:
        told.set_callback(callback)
    result = None
    try:
        result = run(*args, **kwargs)
    finally:
        callback = told.set_callback(None)
        try:
            end(result)
        finally:
            told.set_callback(callback)
    return result


def _telling(key: int, function: FunctionType) -> CodeType:
    code = _template.__code__
    constants = tuple(key if constant == "key" else constant for constant in code.co_consts)
    return code.replace(co_consts=constants, co_name=function.__code__.co_name)


def _skip(code: CodeType) -> None:
    """Have the compiler run this code as it is, where it was called to compile it."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    skip = None if eval_frame is None else getattr(eval_frame, "skip_code", None)
    if skip is not None:
        skip(code)

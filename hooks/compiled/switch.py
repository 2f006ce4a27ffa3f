"""Chooses the version of compiled code that runs: the user's, or while a watcher is armed the one that reads.

Dynamo keeps the versions of a code object apart by the backend that compiled them. An armed watcher has every
compiled function run with a backend of its own name, which compiles with the user's: so the user's version is
neither changed nor compiled again, whatever compiled it and whenever.

This leans on what torch.compile does inside (`torch._dynamo.eval_frame._callback_from_stance`,
`OutputGraph.call_user_compiler`). Where these are missing, `available` is False.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import fx, nn
from torch.nn.modules import module as modules

from entropy_monitor.hooks.compiled import partition
from entropy_monitor.hooks.compiled.rewrite import Watched, rewrite


class Reader(Watched, Protocol):
    """A watcher's part in compiled code."""

    def enter(self) -> Callable[[], object] | None:
        """Compiled code is entered; returns what to call when it is left, if anything."""

    def island(self, module: nn.Module) -> None:
        """A module's forward begins that is kept from being compiled, within compiled code."""

    def fault(self, error: Exception) -> None:
        """Take note of an error of ours."""


_lock = threading.RLock()
_armed: list[Reader] = []
_originals: list[Any] = []
_compiling = threading.local()
_regions: dict[int, int] = {}
_twins: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


@functools.cache
def available() -> bool:
    """Whether this version of torch lets compiled code be read."""
    from torch._dynamo import eval_frame, output_graph

    return hasattr(eval_frame, "_callback_from_stance") and hasattr(
        output_graph.OutputGraph, "call_user_compiler"
    )


def is_on() -> bool:
    """Whether `torch.compile` compiles at all; asked where it is at work."""
    from torch._dynamo import config

    return not config.disable


def arm(reader: Reader, unseen: Iterable[Any]) -> None:
    """Have compiled code run in the version that reads.

    Args:
        reader: of the watcher.
        unseen: functions that the compiler is not to look at: where it may compile nothing it would raise.
    """
    from torch._dynamo.eval_frame import skip_code

    for function in unseen:
        skip_code(function.__code__)
    with _lock:
        if not _armed:
            _install()
        _armed.append(reader)


def disarm(reader: Reader) -> None:
    """Go back to the user's version, once no watcher is armed any more."""
    with _lock:
        kept = [other for other in _armed if other is not reader]
        if len(kept) == len(_armed):
            return
        _armed[:] = kept
        if not kept:
            _uninstall()


def _install() -> None:
    from torch._dynamo import eval_frame
    from torch._dynamo.output_graph import OutputGraph

    _originals[:] = [eval_frame._callback_from_stance, OutputGraph.call_user_compiler]
    _put(_choose, _compile)
    partition.install(_refuse)


def _uninstall() -> None:
    _put(*_originals)
    partition.uninstall()


def _refuse(layer: str, why: str) -> None:
    for reader in _armed:
        reader.refuse([layer], why)


def _put(choose: Any, compiler: Any) -> None:
    from torch._dynamo import eval_frame
    from torch._dynamo.output_graph import OutputGraph

    setattr(eval_frame, "_callback_from_stance", choose)  # noqa: B010  torch's own, for which mypy knows better
    setattr(OutputGraph, "call_user_compiler", compiler)  # noqa: B010


def _choose(callback: Any) -> Any:
    """The callback that Dynamo is to use in place of `callback`."""
    chosen = _originals[0](callback)
    try:
        return _version(callback, chosen)
    except Exception as error:  # noqa: BLE001  the user's version is always there
        _fault(error)
        return chosen


def _version(callback: Any, chosen: Any) -> Any:
    from torch._dynamo import config

    if callback is None:
        _tell_of_island()
    if not _armed or config.disable or chosen is None:
        return chosen  # nothing is compiled
    _tell_of_entry()
    convert = getattr(chosen, "_torchdynamo_orig_backend", None)
    if not hasattr(convert, "_clone_with_backend"):
        return chosen  # by a stance of the user's
    twin = _twins.get(chosen)
    if twin is None:
        twin = _twins[chosen] = _Twin(chosen)
    _count_apart()
    return twin


def _tell_of_entry() -> None:
    """Tell the watchers that compiled code is entered, and have them told when it is left.

    The wrapper that asks for a callback keeps a list of what to call at its end.
    """
    cleanups = sys._getframe(3).f_locals.get("cleanups")
    if isinstance(cleanups, list):
        cleanups += [leave for reader in _armed if (leave := reader.enter()) is not None]


def _count_apart() -> None:
    """Have our versions counted apart, so that the user's do not reach torch's limit of versions sooner.

    Dynamo has just noted for whom it counts in this call, and puts that back when the call ends.
    """
    from torch._dynamo import eval_frame

    if hasattr(eval_frame, "set_eval_frame_isolate_recompiles_id"):
        theirs = eval_frame.get_eval_frame_isolate_recompiles_id()  # type: ignore[attr-defined]
        if theirs not in _regions.values():
            if theirs not in _regions:
                _regions[theirs] = next(eval_frame._next_isolate_recompiles_id)
            eval_frame.set_eval_frame_isolate_recompiles_id(_regions[theirs])


def _tell_of_island() -> None:
    """Tell the watchers of a `forward` that `torch.compiler.disable` is about to run."""
    args = sys._getframe(3).f_locals.get("args")
    if isinstance(args, tuple) and args and isinstance(args[0], nn.Module):
        for reader in _armed:
            reader.island(args[0])


class _Backend:
    """The user's backend under another identity."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.__name__ = getattr(backend, "__name__", type(backend).__name__)
        for name in ("reset", "get_compiler_config"):  # what Dynamo may ask of a backend
            if hasattr(backend, name):
                setattr(self, name, getattr(backend, name))

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        return self._backend(module, inputs, **kwargs)


_backends: list[tuple[Any, _Backend]] = []


def _backend_for(backend: Any) -> _Backend:
    """One for all callbacks of equal backends: blocks that were compiled apart share their code."""
    from torch._dynamo.eval_frame import innermost_backend

    innermost = innermost_backend(backend)
    for known, ours in _backends:
        if known is innermost or known == innermost:
            return ours
    _backends.append((innermost, _Backend(backend)))
    return _backends[-1][1]


class _Twin:
    """Compiles what `callback` compiles, in the version that reads."""

    def __init__(self, callback: Any) -> None:
        from torch._dynamo import convert_frame

        convert = callback._torchdynamo_orig_backend
        backend = _backend_for(convert._torchdynamo_orig_backend)
        self._torchdynamo_orig_backend = convert_frame.catch_errors_wrapper(
            convert._clone_with_backend(backend), callback.hooks
        )

    def __call__(self, *args: Any) -> Any:
        _compiling.depth = getattr(_compiling, "depth", 0) + 1
        try:
            with _module_hooks_hidden():
                return self._torchdynamo_orig_backend(*args)
        finally:
            _compiling.depth -= 1


@contextmanager
def _module_hooks_hidden() -> Iterator[None]:
    """Compile as on other steps, when our module hooks are not there."""
    tables = (modules._global_forward_pre_hooks, modules._global_forward_hooks)
    ours = [{key: hook for key, hook in table.items() if _is_ours(hook)} for table in tables]
    for table, mine in zip(tables, ours, strict=True):
        for key in mine:
            del table[key]
    try:
        yield
    finally:
        for table, mine in zip(tables, ours, strict=True):
            table.update(mine)


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("entropy_monitor.hooks")


def _compile(graph: Any, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """`OutputGraph.call_user_compiler`, with the operator inserted in the version that reads."""
    compiler = _originals[1]
    if not getattr(_compiling, "depth", 0):
        return compiler(graph, module, inputs)
    partition.load()
    partition.install(_refuse)
    try:
        change = rewrite(_armed, module, inputs, graph)
    except Exception as error:  # noqa: BLE001  the graph is as it was
        _fault(error)
        change = None
    if change is None:
        return compiler(graph, module, inputs)
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        return compiler(graph, module, inputs)
    except BackendCompilerFailed as error:
        change.undo()
        compiled = compiler(graph, module, inputs)
        for reader in _armed:
            reader.refuse(change.layers, f"the backend failed on the graph that reads it: {error}")
        return compiled


def _fault(error: Exception) -> None:
    for reader in _armed:
        reader.fault(error)

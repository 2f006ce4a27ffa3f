"""The sources whose functions are plain Python: which of them exist in this process, and how each is read."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from entropy_monitor.hooks.calls import Seen
from entropy_monitor.hooks.site import Site
from entropy_monitor.hooks.sources import flash, flex, interception, xformers

_SOURCES = (flash, flex, xformers)


class PythonFunction:
    """The source of one function: see `sources.Source`."""

    GIVES_WEIGHTS = False

    def __init__(self, function: FunctionType, source: Any) -> None:
        self.NAME: str = source.NAME
        self.FUNCTIONS = (function,)
        self._read: Callable[..., Seen | None] = source.read

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> Seen | None:
        """See `Source`."""
        return self._read(interception.original(self.FUNCTIONS[0]), args, kwargs, site)


_known: dict[FunctionType, PythonFunction] = {}


def install(see: interception.See) -> Callable[[], None]:
    """Tell `see` of this thread's calls of all functions that exist by now; see `interception.install`."""
    for source in _SOURCES:
        for function in source.functions():
            if function not in _known:
                _known[function] = PythonFunction(function, source)
    return interception.install(_known, see)


is_inside = interception.is_inside


def source_of(function: Any) -> PythonFunction | None:
    """The source that reads a function, if it was installed."""
    return _known.get(function) if isinstance(function, FunctionType) else None

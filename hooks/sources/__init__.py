"""The ways in which attention is called: one file for each, and the table of their functions."""

from __future__ import annotations

from typing import Any, Protocol

from entropy_monitor.hooks.calls import Seen
from entropy_monitor.hooks.site import Site
from entropy_monitor.hooks.sources import (
    flex_operator,
    multihead,
    normalised,
    python_functions,
    sdpa,
    softmax,
)


class Source(Protocol):
    """One way of calling attention; a module of this package is one.

    Attributes:
        NAME: what the table of heads calls it.
        GIVES_WEIGHTS: whether what the function returns are the attention weights.
        FUNCTIONS: the functions that attention ends in.
    """

    NAME: str
    GIVES_WEIGHTS: bool
    FUNCTIONS: tuple[Any, ...]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site) -> Seen | None:
        """What a call attends with; None if it is no attention.

        Args:
            args: of the call.
            kwargs: of the call.
            site: what is known of the tensors where it is called.

        Raises:
            UnreadError: if it looks like attention and is not read.
        """


_SOURCES: tuple[Source, ...] = (sdpa, softmax, multihead, flex_operator, normalised)
_BY_FUNCTION: dict[Any, Source] = {function: source for source in _SOURCES for function in source.FUNCTIONS}

ATTENTION: frozenset[Any] = frozenset(_BY_FUNCTION)
"""The torch functions that attention ends in."""


def source_of(func: Any) -> Source:
    """The source that reads a function of `ATTENTION`, or a Python function that shows its calls."""
    found: Source | None = python_functions.source_of(func)
    return _BY_FUNCTION[func] if found is None else found


def source_named(name: str) -> Source:
    """The source of a name."""
    return next(source for source in _SOURCES if name == source.NAME)

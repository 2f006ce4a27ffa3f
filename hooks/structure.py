"""Whether a model can have attention at all: looked at before the first forward."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

from entropy_monitor.hooks.names import module_names
from entropy_monitor.hooks.scope import is_leaf

_WORDS = ("attn", "attention", "softmax", "multi_head", "multihead", "transformer")
_DEPTH = 4


def attention_candidates(model: nn.Module) -> list[str]:
    """Names of modules that may compute attention: by class, by name, or by what their forward calls.

    Generous: what is listed may turn out to have none, but a model of which nothing is listed has none that
    could be seen.
    """
    verdicts: dict[type, bool] = {}
    found = []
    for module, name in module_names(model).items():
        if is_leaf(module):
            continue
        kind = type(module)
        if kind not in verdicts:
            verdicts[kind] = isinstance(module, nn.MultiheadAttention) or _speaks_of_attention(kind)
        if verdicts[kind] or _has_word(name.rsplit(".", 1)[-1]):
            found.append(name)
    return found


def is_compiled(module: nn.Module) -> bool:
    """Whether a module's forward runs as compiled code, in which no function can be seen."""
    wrapped = type(module).__name__ == "OptimizedModule"
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def _has_word(text: str) -> bool:
    text = text.lower()
    return any(word in text for word in _WORDS)


def _speaks_of_attention(kind: type) -> bool:
    if any(_has_word(c.__name__) for c in kind.__mro__ if c not in (nn.Module, object)):
        return True
    functions = (f for f in vars_of(kind) if isinstance(f, FunctionType))
    return any(_mentions(f, _DEPTH, set()) for f in functions)


def vars_of(kind: type) -> Iterator[object]:
    """What a class and its bases below `nn.Module` define."""
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for value in vars(base).values():
            yield inspect.unwrap(value) if callable(value) else value


def _mentions(function: FunctionType, depth: int, seen: set[CodeType]) -> bool:
    """Whether a function, or a function of its own package that it calls by name, speaks of attention."""
    code = function.__code__
    if code in seen:
        return False
    seen.add(code)
    names = set(_names(code))
    if any(_has_word(name) for name in names):
        return True
    if depth == 0:
        return False
    for name in names:
        callee = function.__globals__.get(name)
        if not isinstance(callee, FunctionType) or callee.__module__.startswith("torch."):
            continue
        if _mentions(callee, depth - 1, seen):
            return True
    return False


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_varnames
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)

"""Where a model can have attention, by its structure: before a forward, and beside what was seen in one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator
from types import CodeType, FunctionType

from torch import nn
from torch.nn.parameter import is_lazy

from entropy_monitor.hooks.names import clean_name, module_names
from entropy_monitor.hooks.scope import is_leaf

_WORDS = ("attn", "attention", "softmax", "multi_head", "multihead", "transformer")
_SURE_WORDS = ("attn", "attention", "multi_head", "multihead")
_PASSED_ON = ("mask", "attentions")  # names of what is handed through by code that attends to nothing
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


def unseen_attention(model: nn.Module, seen: Collection[str]) -> list[str]:
    """Names of modules that must be expected to compute attention, and in which none was seen.

    Stricter than `attention_candidates`: a softmax alone is none (experts are chosen by one), what has no
    weight matrix within is left to the module around it, and of nested modules only the innermost is named.

    Args:
        model: that ran.
        seen: names of the owners whose attention was seen.
    """
    names = module_names(model)
    roots = whole_model(model)
    inner = {ancestor for name in seen for ancestor in _ancestors(name)} | (roots if seen else set())
    by_code: list[str] = []
    by_name: list[str] = []
    for module, name in names.items():
        if name in inner or is_leaf(module) or not _has_matrix(module):
            continue
        if hasattr(module, "base_layer"):
            continue  # an adapter around a layer is no more than that layer
        if isinstance(module, nn.MultiheadAttention) or _attends(type(module)):
            by_code.append(name)
        elif _has_word(name.rsplit(".", 1)[-1], _SURE_WORDS):
            by_name.append(name)
    # Within attention, what is called `c_attn` or `attn_out` is a projection.
    around = [*by_code, *seen]
    found = by_code + [name for name in by_name if not any(is_within(name, a, roots) for a in around)]
    return [name for name in found if not any(is_within(other, name, roots) for other in found)]


def attention_owners(model: nn.Module) -> list[str]:
    """Names of modules that hold attention and its projections: what `unseen_attention` would expect.

    A module around one of them that is itself named after attention, as where the output projection lies
    beside the rest, stands for it.
    """
    found: dict[str, None] = {}
    for name in unseen_attention(model, ()):
        parent = name.rpartition(".")[0]
        around = bool(parent) and _has_word(parent.rpartition(".")[-1], _SURE_WORDS)
        found[parent if around else name] = None
    return list(found)


def whole_model(model: nn.Module) -> set[str]:
    """The names that stand for all of a model: its own, and that of the module within wrappers."""
    names = module_names(model)
    return {names[module] for name, module in model.named_modules() if not clean_name(name)}


def is_within(name: str, other: str, roots: Collection[str]) -> bool:
    """Whether a module lies within another one; within those of `roots` all do."""
    return name != other and name not in roots and (other in roots or name.startswith(f"{other}."))


def _ancestors(name: str) -> Iterator[str]:
    """A module's name, and those of the modules around it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _has_matrix(module: nn.Module) -> bool:
    return any(is_lazy(p) or p.dim() >= 2 for p in module.parameters())


def _attends(kind: type) -> bool:
    """Whether a class is named after attention, or its code speaks of it, masks apart."""
    if any(_has_word(c.__name__, _SURE_WORDS) for c in kind.__mro__ if c not in (nn.Module, object)):
        return True
    functions = (f for f in vars_of(kind) if isinstance(f, FunctionType))
    names = (name for f in functions for name in _names(f.__code__))
    return any(_has_word(name, _SURE_WORDS) and not _has_word(name, _PASSED_ON) for name in names)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module's forward runs as compiled code, in which no function can be seen."""
    wrapped = type(module).__name__ == "OptimizedModule"
    return (wrapped or compiled_in_place(module)) and not _is_forced_eager()


def compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return getattr(module, "_compiled_call_impl", None) is not None


def _is_forced_eager() -> bool:
    """Whether `torch.compiler.set_stance` has compiled code run as it was written."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return getattr(getattr(frames, "_stance", None), "stance", None) == "force_eager"


def _has_word(text: str, words: Collection[str] = _WORDS) -> bool:
    text = text.lower()
    return any(word in text for word in words)


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

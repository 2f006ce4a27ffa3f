"""Projections that users name themselves, for attention that tracing does not understand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType

import torch
from torch import Tensor, nn

from entropy_monitor.errors import ConfigurationError


@dataclass(frozen=True)
class Projections:
    """W_Q and W_K of every head, as they are used: `q_h = x W_h + b_h` for a token `x` as a row.

    Views of parameters serve best: nothing is copied, and what an optimizer does to them can be told.

    Args:
        query: `[H, d_model, d_head]`, a matrix for each query head.
        key: `[K, d_model, d_head]`, K dividing H: query head h shares key head h // (H / K).
        query_bias: `[H, d_head]`, or None.
        key_bias: `[K, d_head]`, or None.

    Raises:
        ConfigurationError: if shapes do not fit.
    """

    query: Tensor
    key: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("query", "key"):
            weight, bias = getattr(self, name), getattr(self, f"{name}_bias")
            if not isinstance(weight, Tensor) or weight.dim() != 3 or not weight.is_floating_point():
                raise ConfigurationError(
                    f"Projections: {name} must be a floating-point tensor [heads, d_model, d_head], "
                    f"got {_described(weight)}"
                )
            wanted = (weight.shape[0], weight.shape[2])
            if bias is not None and (not isinstance(bias, Tensor) or tuple(bias.shape) != wanted):
                raise ConfigurationError(
                    f"Projections: {name}_bias must be a tensor [heads, d_head] = {list(wanted)}, "
                    f"got {_described(bias)}"
                )
        (h, _, d), (k, _, d_k) = self.query.shape, self.key.shape
        if d != d_k:
            raise ConfigurationError(
                f"Projections: queries and keys must have the same d_head, got {d} and {d_k}"
            )
        if k == 0 or h % k:
            raise ConfigurationError(
                f"Projections: the number of key heads must divide that of query heads, got {k} and {h}"
            )


Function = Callable[[nn.Module], Projections | None]


class Registration:
    """Undoes a registration: call `remove()`, or use it as a context manager."""

    def __init__(self, owner: type[nn.Module] | str, function: Function) -> None:
        self.owner = owner
        self.function = function

    def matches(self, module: nn.Module, name: str) -> bool:
        """Whether it is for a module of a qualified name."""
        if isinstance(self.owner, str):
            return fnmatchcase(name, self.owner)
        return isinstance(module, self.owner)

    def remove(self) -> None:
        """Have projections traced again. Twice does no harm."""
        with _lock:
            if self in _registered:
                _registered.remove(self)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


_registered: list[Registration] = []
_lock = threading.Lock()


def register_projections(owner: type[nn.Module] | str, function: Function) -> Registration:
    """Say where W_Q and W_K of a module's attention lie, for every model of this process.

    It wins over what tracing finds. Where the input of the projections is known all the same, it is checked
    once, in the first measured forward, like all projections: the queries and keys that it gives must be
    those that enter attention, up to a factor, rotary embeddings and norms. Of several that match, the
    latest counts.

    Args:
        owner: a class of modules, or a name pattern (`blocks.*.attn`) as `fnmatch` knows them, for the
            modules that own attention: those named in the column `layer`.
        function: is given such a module whenever its attention is measured, within its forward but without
            gradients and autocast, and returns its `Projections` as they are then; or None to leave it to
            tracing.

    Returns:
        What undoes it.

    Raises:
        ConfigurationError: if an argument is of the wrong kind.
    """
    is_class = isinstance(owner, type) and issubclass(owner, nn.Module)
    if not is_class and not (isinstance(owner, str) and owner):
        raise ConfigurationError(
            f"register_projections: owner must be a class of modules or a name pattern, got {owner!r}"
        )
    if not callable(function):
        raise ConfigurationError(
            f"register_projections: function must take a module and return em.Projections, got {function!r}"
        )
    registration = Registration(owner, function)
    with _lock:
        _registered.append(registration)
    return registration


def registered_projections(module: nn.Module, name: str) -> Projections | None:
    """What was registered for a module of a qualified name; None where nothing was.

    Raises:
        ConfigurationError: if the function that was registered fails, or returns something else.
    """
    with _lock:
        candidates = [r for r in reversed(_registered) if r.matches(module, name)]
    for registration in candidates:
        try:
            found = _as_they_are(registration.function, module)
        except Exception as error:
            raise ConfigurationError(
                f"the function registered for the projections of {name} failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        if found is None:
            continue
        if not isinstance(found, Projections):
            raise ConfigurationError(
                f"the function registered for the projections of {name} must return em.Projections or None, "
                f"got {type(found).__name__}"
            )
        return found
    return None


def _as_they_are(function: Function, module: nn.Module) -> Projections | None:
    """What a function says, computed in the weights' own dtype also where the forward runs under autocast."""
    device = next((p.device.type for p in module.parameters()), "cpu")
    if not torch.amp.is_autocast_available(device):
        device = "cpu"
    with torch.no_grad(), torch.autocast(device, enabled=False):
        return function(module)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}".replace("torch.", "")
    return type(value).__name__

"""A mode in which attention runs in float32, whatever the precision around it."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.hooks.products import FUNCTIONS as PRODUCTS
from entropy_monitor.hooks.sources import flex_operator, sdpa, softmax

_LOW = (torch.bfloat16, torch.float16)
_IN_PLACE = frozenset({Tensor.baddbmm_})
_SDPA = frozenset(sdpa.FUNCTIONS)
_SOFTMAX = frozenset(softmax.FUNCTIONS)
_FLEX = frozenset(flex_operator.FUNCTIONS)
_LINEAR = frozenset({F.linear, torch.addmm, Tensor.addmm})
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def _project(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor | None) -> list[Tensor]:
    """Queries, keys and values of torch's multi-head attention; raised here, for it scales queries first."""
    weights, biases = parameters[:3], parameters[3:] or (None,) * 3
    parts = [F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True) if w is not None]
    return [_up(part) for part in parts]


def _project_packed(q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None) -> list[Tensor]:
    """Likewise from one weight, which is applied once where that can be."""
    if q is k and k is v:
        return [_up(part).contiguous() for part in F.linear(q, w, b).chunk(3, -1)]
    return _project(q, k, v, *w.chunk(3), *((None,) * 3 if b is None else b.chunk(3)))


# Torch's own code, but for its projections, and the question whether a mode is on: it sees the inside then.
_multi_head_attention_forward = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {
        **vars(F),
        "has_torch_function": lambda _: False,
        "_in_projection": _project,
        "_in_projection_packed": _project_packed,
    },
    F.multi_head_attention_forward.__name__,
    F.multi_head_attention_forward.__defaults__,
)
_multi_head_attention_forward.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


class Float32Operands(TorchFunctionMode):
    """Within it, attention runs in float32 where it would run in bfloat16 or float16.

    Fused attention gets float32 operands, and its result comes back in the dtype that it would have had. Of
    attention written by hand, each product of two activations is computed in float32: logits stay float32
    until their softmax, and what the weights of that softmax are multiplied with comes back in the lower
    dtype.

    Attributes:
        passive: see all functions and change none, which keeps torch from its fused encoder layers.
        lower: the dtype that was raised; None where nothing was.
    """

    # Defaults of the class, for the compiler cannot follow a constructor of modes.
    passive = False
    lower: torch.dtype | None = None
    _logits = 0  # products since the last softmax
    _weights = 0  # softmaxes whose weights have not been used

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.passive:
            return _call(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(args, kwargs)
        if func in _SDPA:
            return self._raised(func, args, kwargs, back=True)
        if func in PRODUCTS and func not in _IN_PLACE and "out" not in kwargs:
            return self._product(func, args, kwargs)
        if func in _SOFTMAX and self._logits:  # one of a router's comes after no product
            self._weights, self._logits = self._weights + 1, 0
            return self._raised(func, args, kwargs, back=False)
        if func in _LINEAR and self.lower is not None:
            return self._linear(func, args, kwargs)
        if func in _FLEX:
            raise ConfigurationError(
                "fp32_attention: FlexAttention was called; its kernels are made for the dtype of their "
                "operands, and are not "
                "covered. Use scaled_dot_product_attention in this model, or leave the layer out with "
                "layers=…"
            )
        return _call(func, args, kwargs)

    def _multi_head(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("query", "in_proj_weight", "q_proj_weight")
        bound = _SIGNATURE.bind(*args, **kwargs).arguments
        self.lower = _lower([bound.get(name) for name in names], {}) or self.lower
        with self:
            out, weights = _multi_head_attention_forward(*args, **kwargs)
        rounded = out.device.type == "cpu" or not torch.is_autocast_enabled(out.device.type)
        if weights is not None and self.lower is not None and rounded:
            weights = weights.to(self.lower)  # elsewhere autocast computes a softmax in float32
        return out, weights

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = [t for t in _tensors(args, kwargs) if t.is_floating_point()][-2:]
        if len(operands) < 2 or any(t.dim() < 2 for t in operands) or _has_weight(*operands):
            return func(*args, **kwargs)
        uses_weights = self._weights > 0
        if uses_weights:
            self._weights -= 1
        else:
            self._logits += 1
        return self._raised(func, args, kwargs, back=uses_weights)

    def _raised(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, back: bool) -> Any:
        lower = _lower(args, kwargs)
        if lower is None:
            return func(*args, **kwargs)
        self.lower = lower
        device = _tensors(args, kwargs)[0].device.type
        with torch.autocast(device, enabled=False):
            result = func(*_up(args), **{name: _up(value) for name, value in kwargs.items()})
        return result.to(lower) if back else result

    def _linear(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A linear map of what stayed float32 and did not have to: it takes its weight's dtype."""
        tensors = _tensors(args, kwargs)
        if torch.is_autocast_enabled(tensors[0].device.type) or not any(t.dtype in _LOW for t in tensors):
            return func(*args, **kwargs)
        lower = next(t.dtype for t in tensors if t.dtype in _LOW)
        down = [a.to(lower) if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in args]
        return func(*down, **kwargs)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is Tensor.unflatten:  # the compiler can follow the method, not the function
        return args[0].unflatten(*args[1:], **kwargs)
    return func(*args, **kwargs)


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def _has_weight(left: Tensor, right: Tensor) -> bool:
    """Whether one of two operands is a weight; queries may be learned, `[1, T, D]`."""
    return _is_weight(right) or (_is_weight(left) and left.dim() == 2)


def _is_weight(tensor: Tensor) -> bool:
    if isinstance(tensor, nn.Parameter):
        return tensor.dim() in (2, 3)
    base = None if torch.compiler.is_compiling() else tensor._base
    return tensor.dim() in (2, 3) and isinstance(base, nn.Parameter)


def _lower(args: Any, kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype in which a function would run that is to run in float32; None where it does so anyway."""
    tensors = [t for t in _tensors(args, kwargs) if t.is_floating_point()]
    if not tensors or any(t.dtype == torch.float64 for t in tensors):
        return None
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return next((t.dtype for t in tensors if t.dtype in _LOW), None)


def _up(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _LOW else value
    if isinstance(value, (list, tuple)):
        return type(value)([_up(x) for x in value])
    return value

"""The linear maps that ran in a forward: what they were, and enough to recognise their outputs later."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from entropy_monitor.hooks.products import is_weight
from entropy_monitor.hooks.projections import Layout, Projection, parameters_of

_ADDMM = (torch.addmm, Tensor.addmm)
_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
FUNCTIONS: frozenset[Callable[..., Any]] = frozenset({F.linear, *_ADDMM, *_MATMUL})


class LinearCall:
    """One linear map that ran: what it was, and enough to recognise its output later."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        input: Tensor,  # noqa: A002  torch's name for it
        output: Tensor,
        parameters: tuple[nn.Parameter, ...],
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.parameters = parameters
        self.shape = output.shape
        self.contiguous = output.is_contiguous()
        self.offset = output.storage_offset()
        # A weak reference keeps the storage's identity from being reused, not its memory.
        self.storage = StorageWeakRef(output.untyped_storage())
        self.version = version_of(output)
        self._input: Callable[[], Tensor | None] = lambda: input
        self._output: Callable[[], Tensor | None] = lambda: output

    def release(self) -> None:
        """Stop keeping activations alive: from now on they are there only as long as the model needs them."""
        for slot in ("_input", "_output"):
            tensor = getattr(self, slot)()
            setattr(self, slot, weakref.ref(tensor) if tensor is not None else lambda: None)

    def whole(self) -> Projection:
        """The map as one head that takes all output features."""
        out = self.shape[-1]
        return Projection(
            self.weight, self.bias, Layout(1, out, 0, out), None, None, parameters=self.parameters
        )

    @property
    def input(self) -> Tensor | None:
        """What the map was applied to, if it is still there."""
        return self._input()

    @property
    def output(self) -> Tensor | None:
        """What it returned, if that is still there."""
        return self._output()


def version_of(tensor: Tensor) -> int:
    """Changes when a tensor, or one that shares its memory, is written in place."""
    return -1 if tensor.is_inference() else tensor._version


def linear_call(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
    module: nn.Module,
) -> LinearCall | None:
    """The linear map that a torch function was; None if it was none.

    Args:
        func: the function that ran.
        args: its arguments.
        kwargs: its keyword arguments.
        output: what it returned.
        module: whose forward called it, for the parameters behind a weight that is computed (reparametrized).
    """
    if func not in FUNCTIONS:
        return None
    if func is F.linear:
        x, weight, bias = _linear_arguments(*args, **kwargs)
    elif func in _ADDMM and len(args) >= 3:
        bias, x, weight = args[0], args[1], args[2].transpose(-1, -2)
    elif func in _MATMUL and len(args) == 2 and isinstance(args[1], Tensor) and is_weight(args[1]):
        x, weight, bias = args[0], args[1].transpose(-1, -2), None
    else:
        return None
    if weight.dim() != 2:
        return None
    parameters = parameters_of(weight) or _matrices(module)
    return LinearCall(weight, bias, x, output, parameters)


def _matrices(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """The matrices behind a computed weight, where the module that ran it is a single linear layer."""
    return tuple(p for p in module.parameters() if p.dim() > 1) if isinstance(module, nn.Linear) else ()


def _linear_arguments(
    input: Tensor,  # noqa: A002  torch's name for it
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias

"""Which linear map a tensor comes from, followed from function to function.

A view of a linear map's output shows its origin by its memory. What is computed from it element by
element, row by row, copied or repeated (rotary embeddings, norms, scaling, casts, `contiguous`) keeps it.
A sum with something else, such as a low-rank adapter's output, is no projection any more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from entropy_monitor.hooks.features import Features, features_of
from entropy_monitor.hooks.linears import LinearCall, LinearMap
from entropy_monitor.hooks.notes import Notes
from entropy_monitor.hooks.storage import storage_of

_SUMS = frozenset(
    {"add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__", "lerp"}
)
_MIXING = frozenset(
    {"conv1d", "conv2d", "conv3d", "bilinear", "cumsum", "fft", "rfft", "tensordot", "inner", "matmul", "bmm"}
)


@dataclass(frozen=True)
class Origin:
    """The linear map, and which of its output features a tensor holds."""

    linear: LinearMap
    features: Features

    def merged(self, other: Origin) -> Origin | None:
        """The origin of what is made from both; None if there is not one."""
        if self.linear is not other.linear:
            return None
        features = self.features.merged(other.features)
        return None if features is None else Origin(self.linear, features)


class Lineage:
    """The origins of the tensors of one forward.

    Attributes:
        settled: what was found out by looking at values, kept from forward to forward.
    """

    def __init__(self, settled: dict[Hashable, Any]) -> None:
        self.settled = settled
        self._roots: dict[int, LinearCall] = {}
        self._notes = Notes[Origin]()

    def add(self, linear: LinearCall, features: Features | None, output: Tensor) -> None:
        """Note a linear map that ran."""
        identity = storage_of(output)
        if identity is not None and linear.feature_stride:
            self._roots[identity] = linear
        elif features is not None:
            self._notes.put(output, Origin(linear, features))

    def root_of(self, tensor: Tensor) -> LinearCall | None:
        """The linear map that a tensor is a view of the output of."""
        identity = storage_of(tensor)
        return None if identity is None else self._roots.get(identity)

    def origin_of(self, tensor: Tensor) -> Origin | None:
        """Where a tensor comes from, if that is one linear map."""
        linear = self.root_of(tensor)
        if linear is None:
            return self._notes.get(tensor)
        features = None if linear.mixed else features_of(tensor, linear)
        return None if features is None else Origin(linear, features)

    def follow(self, func: Callable[..., Any], args: tuple[Any, ...], result: Tensor) -> None:
        """Note where the result of a function comes from."""
        name = str(getattr(func, "__name__", "")).partition(".")[0]
        operands = list(tensors_in(args))
        root = self.root_of(result)
        if root is not None:
            if not name.endswith("_") or name == "__get__" or len(operands) < 2:
                return  # a view
            origin = self._joint(name, operands[:1] + [t for t in operands if t is not result])
            root.mixed |= origin is None
            return
        origin = None if name in _MIXING else self._joint(name, operands)
        if origin is not None:
            self._notes.put(result, origin)

    def _joint(self, name: str, operands: list[Tensor]) -> Origin | None:
        joint: Origin | None = None
        for tensor in operands:
            origin = self.origin_of(tensor)
            if origin is None:
                if self.root_of(tensor) is not None or (name in _SUMS and not _is_learned(tensor)):
                    return None
                continue
            joint = origin if joint is None else joint.merged(origin)
            if joint is None:
                return None
        return joint


def tensors_in(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among arguments, those in lists too."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (a for a in arg if isinstance(a, Tensor))


def _is_learned(tensor: Tensor) -> bool:
    """A parameter, or a scalar: what may be added to a query without making it something else."""
    base = tensor if tensor._base is None else tensor._base
    return tensor.numel() == 1 or isinstance(base, nn.Parameter)

"""Which linear map a tensor comes from, followed from function to function.

A view of a linear map's output shows its origin by its memory. What is computed from it element by
element, row by row, copied or repeated (rotary embeddings, norms, scaling, casts, `contiguous`) keeps it.
The sum of two maps of the same input, such as of a weight and a low-rank adapter, is a linear map again; a
sum with something else is no projection any more. Nothing here looks at values: tensors may be fake.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from entropy_monitor.hooks.arithmetic import ADDITIONS, FRESH, JOINS, MIXING, SUMS, factor_after
from entropy_monitor.hooks.features import Features, features_of, features_taken
from entropy_monitor.hooks.linears import LinearCall, LinearMap
from entropy_monitor.hooks.notes import Notes
from entropy_monitor.hooks.pieces import Pieces
from entropy_monitor.hooks.reasons import Reasons
from entropy_monitor.hooks.scope import Scope
from entropy_monitor.hooks.storage import storage_of

_SUM_OF_MAPS = "{} are a sum of two linear maps, of different inputs or changed on the way"
_SUM = "{} are a linear map's output with something else added to it"


@dataclass(frozen=True)
class Origin:
    """The linear map, and which of its output features a tensor holds.

    Attributes:
        linear: the map.
        features: of its output.
        factor: c where the tensor is c times these features and nothing else; None where more was done.
    """

    linear: LinearMap
    features: Features
    factor: float | None = 1.0

    def merged(self, other: Origin) -> Origin | None:
        """The origin of what is made from both; None if there is not one."""
        if self.linear is not other.linear or isinstance(other, Joined):
            return None
        features = self.features.merged(other.features)
        return None if features is None else Origin(self.linear, features, None)


@dataclass(frozen=True)
class Joined(Origin):
    """Heads whose features were put together from several origins. What it says itself is of the first.

    Attributes:
        parts: width and origin of each, in order.
    """

    parts: tuple[tuple[int, Origin], ...] = ()

    def merged(self, other: Origin) -> Origin | None:
        """See `Origin`; two of a kind make one of that kind."""
        same = isinstance(other, Joined) and self.parts == other.parts
        return replace(self, factor=None) if same else None

    @property
    def widths(self) -> list[int]:
        """Of the parts, in order."""
        return [width for width, _ in self.parts]

    @property
    def width(self) -> int:
        """Of all parts together."""
        return sum(self.widths)


class Lineage:
    """The origins of the tensors of one forward.

    Attributes:
        settled: what was found out by looking at values, kept from forward to forward.
    """

    def __init__(self, settled: dict[Hashable, Any]) -> None:
        self.settled = settled
        self._roots: dict[int, LinearCall] = {}
        self._notes = Notes[Origin]()
        self._pieces = Pieces[Origin]()
        self._reasons = Reasons()

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
        """Where a tensor comes from, if that is one linear map, or several for parts of each head."""
        linear = self.root_of(tensor)
        if linear is not None:
            features = None if linear.mixed else features_of(tensor, linear)
            return None if features is None else Origin(linear, features)
        found = self._notes.get(tensor)
        if found is None and (parts := self._pieces.of(tensor)) is not None:
            return _joined(parts)
        return found

    def reason_of(self, tensor: Tensor) -> str | None:
        """Why a tensor has no origin, where that is known; "{}" stands for what the tensor is."""
        return self._reasons.get(tensor)

    def follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        result: Tensor,
        scope: Scope | None = None,
        module: nn.Module | None = None,
    ) -> LinearCall | None:
        """Note where the result of a function comes from.

        Returns:
            The linear map that the result is of, where that is a sum of others.
        """
        name = str(getattr(func, "__name__", "")).partition(".")[0]
        operands = list(tensors_in(args))
        if name in FRESH or (not name.endswith("_") and any(t is result for t in operands)):
            return None
        root = self.root_of(result)
        if root is not None:
            if not name.endswith("_") or name == "__get__" or len(operands) < 2:
                return None  # a view
            origin = self._joint(name, operands[:1] + [t for t in operands if t is not result])
            if origin is None:
                root.mixed = True
                self._reasons.put(result, _SUM)
            return None
        if name == "copy_" and len(operands) == 2:
            self._pieces.put(result, self.origin_of(operands[1]))
            return None
        if name in ADDITIONS and scope is not None and module is not None:
            linear = self._sum(operands, args, result, scope, module)
            if linear is not None:
                return linear
        origin = self._origin_after(name, args, operands, result)
        if origin is not None:
            self._notes.put(result, origin)
        else:
            self._pass_reason(name, operands, result)
        return None

    def _origin_after(
        self, name: str, args: tuple[Any, ...], operands: list[Tensor], result: Tensor
    ) -> Origin | None:
        if name in MIXING:
            return None
        if name == "__getitem__" and (source := self.root_of(operands[0])) is not None:
            features = None if source.mixed else features_taken(operands[0], args[1], source)
            return None if features is None else Origin(source, features)
        origin = self._joint(name, operands)
        full = [t for t in operands if t.numel()]
        if name in JOINS and full and result.shape[-1] != full[0].shape[-1]:
            origins = [self.origin_of(t) for t in full]
            told = [(t.shape[-1], o) for t, o in zip(full, origins, strict=True) if o is not None]
            if len(told) < len(full):
                return None
            return _joined(told) if origin is None else origin
        if isinstance(origin, Joined) and origin.width not in result.shape:
            return None  # a part of each head
        return None if origin is None else replace(origin, factor=factor_after(name, args, origin.factor))

    def _sum(
        self, operands: list[Tensor], args: tuple[Any, ...], result: Tensor, scope: Scope, module: nn.Module
    ) -> LinearCall | None:
        """`W x + c · V x` is `(W + c V) x`."""
        origins = [self.origin_of(t) for t in operands]
        if len(operands) != 2 or len(args) != 2 or operands[0].shape != operands[1].shape:
            return None
        first, second = origins
        if first is None or second is None or first.linear is second.linear:
            return None
        if first.linear.latent is not None or first.factor != 1:
            first, second = second, first
        whole = Features(0, ((result.shape[-1], 1),))
        told = first.features == second.features == whole and first.linear.features == result.shape[-1]
        base = first.linear
        if not told or first.factor != 1 or second.factor is None or not isinstance(base, LinearCall):
            return None
        if second.linear.from_width(base.weight.shape[1]) is None:
            return None
        linear = LinearCall(base.weight, base.bias, base.input, result, scope, module)
        linear.parameters = base.parameters
        linear.latent = base.latent
        linear.added = (*base.added, (second.factor, second.linear))
        self.add(linear, None, result)
        return linear

    def _pass_reason(self, name: str, operands: list[Tensor], result: Tensor) -> None:
        known = [self.origin_of(t) for t in operands]
        if name in SUMS and any(known):
            self._reasons.put(result, _SUM_OF_MAPS if all(known) else _SUM)
            return
        for tensor in operands:
            if (reason := self.reason_of(tensor)) is not None:
                self._reasons.put(result, reason)
                return

    def _joint(self, name: str, operands: list[Tensor]) -> Origin | None:
        joint: Origin | None = None
        for tensor in operands:
            if tensor.numel() == 0:  # nothing of the result comes from it
                continue
            origin = self.origin_of(tensor)
            if origin is None:
                if self.root_of(tensor) is not None or (name in SUMS and not _is_learned(tensor)):
                    return None
                continue
            joint = origin if joint is None else joint.merged(origin)
            if joint is None:
                return None
        return joint


def is_latent(linear: LinearCall, inner: Origin | None) -> bool:
    """Whether a map's input is a bottleneck that another map of the same forward made.

    Args:
        linear: the outer map.
        inner: where its input comes from.
    """
    return (
        inner is not None
        and not isinstance(inner, Joined)
        and isinstance(inner.linear, LinearCall)
        and inner.linear.home is linear.home
        and inner.linear.input is not None
        and len(inner.features.dims) == 1
        and inner.features.count == linear.weight.shape[1] < inner.linear.weight.shape[1]
    )


def tensors_in(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among arguments, those in lists too."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from (a for a in arg if isinstance(a, Tensor))


def _joined(parts: list[tuple[int, Origin]]) -> Origin | None:
    """The origin of heads put together from parts, themselves perhaps put together."""
    flat: list[tuple[int, Origin]] = []
    for width, origin in parts:
        if isinstance(origin, Joined):
            if origin.width != width:
                return None
            flat += origin.parts
        else:
            flat.append((width, origin))
    _, first = flat[0]
    return Joined(first.linear, first.features, None, tuple(flat))


def _is_learned(tensor: Tensor) -> bool:
    """A parameter, or a scalar: what may be added to a query without making it something else."""
    base = tensor if tensor._base is None else tensor._base
    return tensor.numel() == 1 or isinstance(base, nn.Parameter)

"""Tensors that a process holds a part of: DTensors, as tensor parallel and FSDP2 make them.

A torch function of DTensors is the same function of their local parts wherever nothing has to be exchanged,
so it is followed on those. Nothing here communicates: where a part lies is computed from the mesh and the
placements.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from entropy_monitor.hooks.notes import Notes

_MODULES = "torch.distributed.tensor"
_OUTER = 2  # dimensions of q and of logits that may not be split: tokens and what each has


@dataclass(frozen=True)
class Shard:
    """The part of a weight that this process holds.

    Attributes:
        dims: which dimensions are split; empty for a copy of the whole.
        offset: index of its first element in the whole, along each dimension.
        shape: of the whole.
        ranks: the processes that hold the whole together.
    """

    dims: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]


# Mesh, placements and shape of the DTensor that a local part was shown for, for as long as the part lives.
_origins = Notes[tuple[Any, Any, torch.Size]]()


def local(value: Any) -> Any:
    """What this process holds of a DTensor, or of those in a list or dict; anything else as it is.

    A parameter becomes a parameter that shares its memory, so that it is still known as a weight.
    """
    if _MODULES not in sys.modules:  # no DTensor was ever made
        return value
    if isinstance(value, Tensor):
        return _local_tensor(value) if is_sharded(value) else value
    if type(value) in (tuple, list):
        return type(value)(local(item) for item in value)
    if type(value) is dict:
        return {name: local(item) for name, item in value.items()}
    return value


def held(tensor: Any) -> Tensor:
    """The very tensor within a DTensor."""
    found: Tensor = tensor._local_tensor
    return found


def with_local(tensor: Any, part: Tensor) -> Tensor:
    """A DTensor like another one, of another local part; a parameter if that is one."""
    made = type(tensor)(part.detach(), tensor._spec, requires_grad=tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        made._is_param = True
    found: Tensor = made
    return found


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: a process holds a part of it, or a copy."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def shard_of(weight: Tensor) -> Shard | None:
    """Which part of a weight this is, for what `local` gave or a view of it; None for a plain tensor."""
    origin = _origins.get(weight)
    if origin is None and weight._base is not None:
        origin = _origins.get(weight._base)
    if origin is None:
        return None
    with unset_fake_temporarily():  # a mesh is no less real where tensors are fake
        return _shard(*origin)


def splits_inputs(weight: Tensor, shard: Shard) -> bool:
    """Whether a process holds only some of the input features of a `[out, in]` weight."""
    whole = weight if weight._base is None else weight._base
    return any(whole.stride(dim) == weight.stride(1) for dim in shard.dims)


def first_of(heads: int, weight: Tensor, shard: Shard) -> int | None:
    """The number of the first head that a process holds; None where heads are cut in two.

    Args:
        heads: how many the process holds.
        weight: its part of W_Q, or of a weight that holds W_Q, `[out, in]`.
        shard: which part that is.
    """
    if not shard.dims:
        return 0
    if len(shard.dims) > 1:
        return None
    (dim,) = shard.dims
    whole = weight if weight._base is None else weight._base
    first, rest = divmod(shard.offset[dim] * heads, whole.shape[dim])
    return None if rest else first


class _Observer(Protocol):
    def reject(self, why: str) -> None: ...

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None: ...

    def after(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor, module: nn.Module
    ) -> None: ...


def show_before(observer: _Observer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Show an observer attention that is about to run, on what this process holds of DTensors."""
    with torch._C.DisableTorchFunction():
        why = unreadable(args, kwargs)
        if why:
            observer.reject(why)
        else:
            observer.before(func, local(args), local(kwargs))


def show_after(
    observer: _Observer,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Tensor,
    module: nn.Module,
) -> None:
    """Show an observer a function that ran, likewise."""
    with torch._C.DisableTorchFunction():
        observer.after(func, local(args), local(kwargs), local(result), module)


def unreadable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why the local parts of an attention function's arguments do not tell its result; empty if they do."""
    if _MODULES not in sys.modules:
        return ""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    tensors, others = given[:_OUTER], given[_OUTER:]
    sharded = [x for x in tensors if is_sharded(x)]
    for tensor in sharded:
        for placement in _placements(tensor):
            if placement.is_partial():
                return "its queries, keys or logits are partial sums"
            if placement.is_shard() and placement.dim % tensor.dim() >= tensor.dim() - _OUTER:
                return "its tokens or features are split over processes"
    placements = {_placements(x) for x in sharded}
    if len(placements) > 1 or (sharded and len(sharded) < len(tensors)):
        return "its queries and keys are split over processes in different ways"
    if sharded and not all(_split_alike(sharded[0], other) for other in others if is_sharded(other)):
        return "its masks, values or weights are split over processes in other ways than its queries"
    return ""


def _split_alike(queries: Tensor, other: Tensor) -> bool:
    """Whether local parts belong together: split alike, or whole where it is the same for all parts."""
    placements = _placements(other)
    if placements == _placements(queries):
        return True
    if not all(p.is_replicate() for p in placements):
        return False
    split = [p.dim % queries.dim() for p in _placements(queries) if p.is_shard()]
    own = [dim - queries.dim() + other.dim() for dim in split]
    return all(dim < 0 or other.shape[dim] == 1 for dim in own)


def _placements(tensor: Any) -> tuple[Any, ...]:
    return tuple(tensor.placements)


def _local_tensor(tensor: Any) -> Tensor:
    part = tensor._local_tensor
    if hasattr(part, "trigger_wait"):  # still being gathered, for the function that is about to use it
        part = part.trigger_wait()
    if isinstance(tensor, nn.Parameter):
        part = nn.Parameter(part.detach(), requires_grad=False)
    held: Tensor = part
    _origins.put(held, (tensor.device_mesh, tensor.placements, tensor.shape))
    return held


def _shard(mesh: Any, placements: Any, shape: torch.Size) -> Shard:
    offset, size = [0] * len(shape), list(shape)
    dims: list[int] = []
    ranks = mesh.mesh
    for i in reversed(range(mesh.ndim)):
        if not placements[i].is_shard():
            ranks = ranks.select(i, mesh.get_local_rank(i))
    for i, placement in enumerate(placements):
        if placement.is_shard():
            dim = placement.dim % len(shape)
            part = -(-size[dim] // mesh.size(i))  # as torch.chunk divides
            before = min(mesh.get_local_rank(i) * part, size[dim])
            offset[dim] += before
            size[dim] = min(part, size[dim] - before)
            dims.append(dim)
    held_by = ranks.flatten().tolist()
    return Shard(tuple(sorted(set(dims))), tuple(offset), tuple(shape), tuple(sorted(held_by)))

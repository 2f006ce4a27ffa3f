"""Fresh tensors that are filled piece by piece: what was written where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from entropy_monitor.hooks.storage import storage_of

N = TypeVar("N")


@dataclass(frozen=True)
class _Written(Generic[N]):
    """A part of a tensor's memory that was written, and what is known of what was written."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    note: N | None


class Pieces(Generic[N]):
    """What was copied into parts of tensors."""

    def __init__(self) -> None:
        self._written: dict[int, tuple[StorageWeakRef, list[_Written[N]]]] = {}

    def put(self, target: Tensor, note: N | None) -> None:
        """Note that `target`, part of a larger tensor or a whole one, was filled."""
        identity = storage_of(target)
        if identity is None:
            return
        kept = self._written.get(identity)
        if kept is None or kept[0].expired():  # type: ignore[no-untyped-call]
            alive = StorageWeakRef(target.untyped_storage())  # type: ignore[no-untyped-call]
            kept = self._written[identity] = (alive, [])
        place = (int(target.storage_offset()), tuple(target.shape), target.stride())
        kept[1].append(_Written(*place, note))

    def of(self, tensor: Tensor) -> list[tuple[int, N]] | None:
        """Width and note of each piece along the last dimension; None unless they make up the tensor."""
        identity = storage_of(tensor)
        kept = None if identity is None else self._written.get(identity)
        if kept is None or kept[0].expired():  # type: ignore[no-untyped-call]
            return None
        shape, stride = tuple(tensor.shape), tensor.stride()
        at, found = int(tensor.storage_offset()), []
        for piece in sorted(kept[1], key=lambda w: w.offset):
            if piece.note is None or piece.shape[:-1] != shape[:-1] or piece.stride != stride:
                return None
            if piece.offset != at:
                return None
            at += piece.shape[-1] * stride[-1]
            found.append((piece.shape[-1], piece.note))
        return found if at == tensor.storage_offset() + shape[-1] * stride[-1] else None

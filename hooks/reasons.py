"""Why tensors have no origin, kept by their memory: views have the reason of what they are views of."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from entropy_monitor.hooks.storage import storage_of


class Reasons:
    """The first reason that was put for each tensor's memory, as long as that lives."""

    def __init__(self) -> None:
        self._reasons: dict[int, tuple[StorageWeakRef, str]] = {}

    def put(self, tensor: Tensor, reason: str) -> None:
        """Keep a reason, unless there is one."""
        identity = storage_of(tensor)
        if identity is not None and self.get(tensor) is None:
            alive = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self._reasons[identity] = (alive, reason)

    def get(self, tensor: Tensor) -> str | None:
        """The reason for a tensor, if there is one."""
        identity = storage_of(tensor)
        kept = None if identity is None else self._reasons.get(identity)
        return None if kept is None or kept[0].expired() else kept[1]  # type: ignore[no-untyped-call]

"""Which memory a tensor lies in, and whether it was written since."""

from __future__ import annotations

import torch
from torch import Tensor


def storage_of(tensor: Tensor) -> int | None:
    """Identity of a tensor's memory; None without a plain one (sparse, nested, batched by vmap)."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor's memory was given back, as FSDP does with weights once their module ran."""
    return tensor.numel() > 0 and tensor.untyped_storage().size() == 0


def version_of(tensor: Tensor) -> int:
    """Changes when a tensor's memory is written in place; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version

"""The arithmetic of every measure: which dtype, how exact a product, how large a block."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BYTES = 64 * 2**20
"""Default limit, in bytes, for the temporaries of one measure."""

_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when one of the tensors is float64, float32 for everything else."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def exact(device: torch.device) -> torch.autocast:
    """A context in which autocast rounds nothing.

    Casting the operands up is not enough: under autocast a product of float32 matrices still runs
    in bfloat16.
    """
    # Devices without autocast (meta) refuse the context; naming the CPU there is a no-op.
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    return torch.autocast(kind, enabled=False)


def matmul_roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff of a matrix product's operands under the process's present settings.

    `torch.set_float32_matmul_precision` (or CUDA's TF32 switch) lets float32 products round their
    operands to 11 or 8 bits. That setting belongs to the watched run, so it is read and allowed
    for, never changed.
    """
    if dtype == torch.float64:
        return 2.0**-53
    try:
        return _ROUNDOFF[torch.get_float32_matmul_precision()]
    except RuntimeError:  # raised where the process mixes the old and the new precision switches
        return _ROUNDOFF["medium"]

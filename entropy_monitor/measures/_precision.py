"""The arithmetic of every measure: which dtype, how exact a product, how large a block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

MAX_BYTES = 64 * 2**20
"""Default limit, in bytes, for the temporaries of one measure."""


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


def without_tangents() -> _set_fwd_grad_enabled:
    """A context that ignores the tangents of forward-mode differentiation, which knows no `out=`."""
    return _set_fwd_grad_enabled(False)


def on_host(x: Tensor) -> bool:
    """Whether values may be looked at: on the CPU nobody waits for a device, and no compiler is at work."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` to the full accuracy of float32, also where the process lets such products round.

    `torch.set_float32_matmul_precision` (or CUDA's TF32 switch) makes float32 products read 8 to 11
    bits of their operands. That setting belongs to the watched run and is left alone; instead the
    operands are split into parts that fit, and the products of the parts are added, small ones
    first.

    Args:
        a: `[..., m, n]`, float32 or float64, finite.
        b: `[..., n, p]`, of the same dtype.
    """
    if a.dtype == torch.float64 or not products_round():
        return a @ b
    a0, a1, a2 = _parts(a)
    b0, b1, b2 = _parts(b)
    return (a0 @ b2 + a1 @ b1 + a2 @ b0) + (a0 @ b1 + a1 @ b0) + a0 @ b0


def products_round() -> bool:
    """Whether float32 matrix products may read less than their operands' 24 bits."""
    try:
        # Also what torch.set_float32_matmul_precision sets, on any machine.
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # the process mixes two generations of precision switches
        return True


def _parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three float32 tensors of at most 8 significant bits each that add up to x."""
    high = x.bfloat16().to(x.dtype)
    middle = (x - high).bfloat16().to(x.dtype)
    return high, middle, x - high - middle

"""All rows of attention in one Triton kernel, from one product q·kᵀ and without anything of size `[Tq, Tk]`.

Half the matrix work of an attention forward. Unmeasured on a GPU: its results are known from Triton's
interpreter, and that it compiles for GPUs from the compiler. The first launch with a combination of options
compiles for some seconds; after that a launch only enqueues, and never waits for the device.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import masks
from entropy_monitor.measures._logits import Modify, check_operands
from entropy_monitor.measures.rows import RowStatistics

LARGEST_HEAD = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_MASK, _BOOLEAN, _ADDITIVE = 0, 1, 2
_UNBOUNDED = 2**30
_OLDEST_GPU = (8, 0)  # the first whose tensor cores take bfloat16


class HeadSums(NamedTuple):
    """Sums over the sequences and the rows of each head that see a key, `[H]` each, float32.

    Attributes:
        rows: how many rows.
        entropy: sum of entropies, nats.
        max_entropy: sum of log n_i, nats.
        max_logit: the largest logit; -inf without a row.
        floor_row: sum of the rows' floors `B(‖u_i - mean(u_i)‖₂, n_i)`, as `measures.floor_row`.
    """

    rows: Tensor
    entropy: Tensor
    max_entropy: Tensor
    max_logit: Tensor
    floor_row: Tensor


def triton_available(device: torch.device) -> bool:
    """Whether the kernel can run there: triton is installed, and the device is an NVIDIA GPU from Ampere on.

    On the CPU where `TRITON_INTERPRET=1` was set before triton was imported. Never imports triton, never
    waits.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= _OLDEST_GPU


def supports_triton(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,  # noqa: ARG001  every question about a call is asked with the same arguments
    softcap: float | None = None,  # noqa: ARG001
    modify: Modify | None = None,
) -> bool:
    """Whether the kernel can read this call, without waiting for a device.

    It takes float32, bfloat16 and float16, head sizes up to `LARGEST_HEAD` and no size 0; soft-cap and masks
    of every kind, but logits that something else modifies it does not.
    """
    if modify is not None or q.dim() != 4 or k.dim() != 4 or q.device != k.device:
        return False
    if q.dtype not in _DTYPES or k.dtype not in _DTYPES or 0 in q.shape or 0 in k.shape:
        return False
    if q.shape[-1] > LARGEST_HEAD or (mask is not None and mask.device != q.device):
        return False
    return triton_available(q.device)


@torch.no_grad()
def triton_row_statistics(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: tuple[int | None, int | None] | None = None,
) -> RowStatistics:
    """Statistics of all rows; arguments as in `row_statistics`, which see for what a mask hides.

    Products of bfloat16 and float16 are exact and added up in float32; of float32, in full float32.

    Args:
        q: `[B, H, Tq, D]`, float32, bfloat16 or float16, D up to `LARGEST_HEAD`; any strides.
        k: `[B, Hk, Tk, D]`, Hk a divisor of H; of another dtype than q, both are read in float32.
        mask: boolean (True = seen) or additive, broadcastable to `[B, H, Tq, Tk]`; broadcast dimensions are
            read in place.
        is_causal: row i sees keys 0 … i, also when Tq ≠ Tk.
        scale: factor of the product, `D**-0.5` by default.
        softcap: c in `c · tanh(scale · q·k / c)`, taken before the mask is added.
        window: (left, right): row i sees keys i - left … i + right; None for no end on that side.

    Returns:
        RowStatistics of `[B, H, Tq]`, float32.

    Raises:
        ConfigurationError: if shapes or dtypes do not fit, or `supports_triton` says no.
    """
    out = _launch(q, k, mask, is_causal, scale, softcap, window, sums=False)
    return RowStatistics(*out[:5].unbind(0))


@torch.no_grad()
def triton_logsumexp(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: tuple[int | None, int | None] | None = None,
) -> Tensor:
    """`log Σ_j e^(u_ij)` of every row, -inf for fully masked rows; arguments as in `triton_row_statistics`.

    Returns:
        `[B, H, Tq]`, float32.
    """
    return _launch(q, k, mask, is_causal, scale, softcap, window, sums=False)[5]


@torch.no_grad()
def triton_head_sums(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    window: tuple[int | None, int | None] | None = None,
) -> HeadSums:
    """Sums over the rows of each head; arguments as in `triton_row_statistics`, of which nothing is kept.

    Every tile of rows writes its sums, and these are added in a fixed order: the same every time.

    Returns:
        HeadSums of `[H]`. NaN where a visible logit is not finite.
    """
    parts = _launch(q, k, mask, is_causal, scale, softcap, window, sums=True)
    rows, entropy, max_entropy, _, floor = parts.sum((1, 3)).unbind(0)
    return HeadSums(rows, entropy, max_entropy, parts[3].amax((0, 2)), floor)


def _launch(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    window: tuple[int | None, int | None] | None,
    *,
    sums: bool,
) -> Tensor:
    """What the kernel writes: `[6, B, H, Tq]` of rows, `[5, B, H, tiles]` of sums."""
    check_operands(q, k, scale, softcap, None)
    if not supports_triton(q, k, mask):
        raise ConfigurationError(
            f"the Triton kernel cannot read q {q.dtype} {tuple(q.shape)} and k {k.dtype} {tuple(k.shape)} on "
            f"{q.device}: it needs triton, an NVIDIA GPU of compute capability 8.0, float32, bfloat16 or "
            f"float16, and head sizes of 1 to {LARGEST_HEAD}; use row_statistics"
        )
    left, right = _reach(window, is_causal)
    # Imported here: triton is optional, and slow to import.
    from entropy_monitor.measures.triton_kernel import row_kernel

    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    if q.dtype != k.dtype:
        q, k = q.float(), k.float()
    kind, given, hiding, two_valued = _mask_operand(mask, (B, H, Tq, Tk), q)
    block_m, block_n, warps = _blocks(D, q.dtype, kind != _NO_MASK)
    tiles = -(-Tq // block_m)
    out = q.new_empty((5, B, H, tiles) if sums else (6, B, H, Tq), dtype=torch.float32)
    # Triton launches on the current device, which may be another one.
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        row_kernel[(B * H * tiles,)](
            q,
            k,
            given,
            two_valued,
            out,
            *q.stride(),
            *k.stride(),
            *(given.stride() if kind != _NO_MASK else (0, 0, 0, 0)),
            out.stride(0),
            H,
            Tq,
            Tk,
            D**-0.5 if scale is None else float(scale),
            1.0 if softcap is None else float(softcap),
            hiding,
            _UNBOUNDED if left is None else left,
            _UNBOUNDED if right is None else right,
            GROUP=H // k.shape[1],
            D=D,
            BLOCK_D=max(16, 1 << (D - 1).bit_length()),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            LEFT=left is not None,
            RIGHT=right is not None,
            SOFTCAP=softcap is not None,
            MASK=kind,
            UPCAST=q.dtype == torch.bfloat16
            and q.device.type == "cpu",  # the interpreter multiplies its bits
            SUMS=sums,
            num_warps=warps,
            num_stages=2,
        )
    return out


def _reach(window: tuple[int | None, int | None] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """How many keys a row sees to its left and right; None = all."""
    left, right = (None, None) if window is None else window
    if any(side is not None and not 0 <= side < _UNBOUNDED for side in (left, right)):
        raise ConfigurationError(
            f"window must be (left, right) of keys, each 0 or more and below {_UNBOUNDED}, got {window}; "
            f"None is no end"
        )
    return left, 0 if is_causal else right


def _mask_operand(
    mask: Tensor | None, shape: tuple[int, int, int, int], q: Tensor
) -> tuple[int, Tensor, float, Tensor]:
    """Kind of mask, the mask as `shape`, the value from which on it hides, and whether it is two-valued."""
    if mask is None:
        return _NO_MASK, q, 0.0, q
    mask = masks.as_four_dimensions(mask, shape)
    if mask.dtype == torch.bool:
        return _BOOLEAN, mask.view(torch.uint8).expand(shape), 0.0, q
    if mask.dtype == torch.float64:
        # Every value that hides and every bias of size survives; Triton would read it at double the cost.
        mask = mask.to(torch.float32)
    limit = masks.hiding_limit(mask.dtype)
    two_valued = masks.is_two_valued(mask).to(torch.int32)
    return _ADDITIVE, mask.expand(shape), limit, two_valued


def _blocks(D: int, dtype: torch.dtype, masked: bool) -> tuple[int, int, int]:
    """Rows and keys in a tile, and warps: large, but spilling few registers (as compiled for sm_90)."""
    if dtype == torch.float32:
        return (64, 32, 4) if D <= 128 else (32, 32, 4)
    if masked:
        return 64, 32, 4
    return (128, 64, 8) if D <= 128 else (64, 64, 4)

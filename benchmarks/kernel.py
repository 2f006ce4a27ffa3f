"""What reading all rows costs on a GPU: the Triton kernel and the fused identity, against a forward.

`python benchmarks/kernel.py` on a machine with CUDA prints times relative to
`F.scaled_dot_product_attention` in bfloat16 (flash), checks the results in float64 on chosen rows, and that
no launch waits for the device. Without CUDA it says so and does the checks on a small shape in Triton's
interpreter, as `--smoke` does anywhere. What rows cost on a CPU is told by `rows.py`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

TOLERANCE = 1e-3  # nats
ROWS_CHECKED = 64


@dataclass(frozen=True)
class Shape:
    """One attention call."""

    batch: int
    heads: int
    key_heads: int
    tokens: int
    size: int
    is_causal: bool

    def operands(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device, "dtype": dtype}
        q = torch.randn(self.batch, self.heads, self.tokens, self.size, **options)
        return 2 * q, torch.randn(self.batch, self.key_heads, self.tokens, self.size, **options)

    def __str__(self) -> str:
        causal = "causal" if self.is_causal else "full"
        return f"B{self.batch} H{self.heads}/{self.key_heads} T{self.tokens} D{self.size} {causal}"


SHAPES = (
    Shape(8, 16, 16, 1024, 64, True),
    Shape(4, 16, 16, 2048, 128, True),
    Shape(2, 32, 8, 4096, 128, True),
    Shape(1, 32, 8, 16384, 128, True),
    Shape(32, 12, 12, 197, 64, False),
    Shape(4, 16, 16, 2048, 128, False),
)
SMOKE = Shape(1, 2, 1, 150, 32, True)


def check(shape: Shape, q: Tensor, k: Tensor) -> float:
    """Largest error of an entropy in nats, of some rows by the kernel and all heads' sums of it."""
    from entropy_monitor.measures import row_statistics
    from entropy_monitor.measures.triton_rows import triton_head_sums, triton_row_statistics

    got = triton_row_statistics(q, k, is_causal=shape.is_causal)
    rows = torch.linspace(0, shape.tokens - 1, min(ROWS_CHECKED, shape.tokens), device=q.device).long()
    want = row_statistics(q.double(), k.double(), is_causal=shape.is_causal, rows=rows)
    error = float((got.entropy[:, :, rows] - want.entropy).abs().max())
    sums = triton_head_sums(q, k, is_causal=shape.is_causal)
    mean = got.entropy.double().mean((0, 2))
    error = max(error, float((sums.entropy / sums.rows - mean).abs().max()))
    if not error < TOLERANCE:
        sys.exit(f"{shape}: an entropy is off by {error} nats")
    return error


def identity_error(shape: Shape, q: Tensor, k: Tensor) -> float:
    """Largest difference in nats between the fused identity and the kernel."""
    from entropy_monitor.measures.fused_entropy import fused_row_entropy
    from entropy_monitor.measures.triton_rows import triton_row_statistics

    fused = fused_row_entropy(q, k, is_causal=shape.is_causal).entropy
    return float((fused - triton_row_statistics(q, k, is_causal=shape.is_causal).entropy).abs().max())


def milliseconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median time of each call, interleaved so that a slow moment of the machine meets them all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(shape: Shape, repeats: int) -> str:
    """One line of the table."""
    from entropy_monitor.measures.fused_entropy import fused_row_entropy
    from entropy_monitor.measures.triton_rows import triton_head_sums, triton_row_statistics

    q, k = shape.operands("cuda", torch.bfloat16)
    v = torch.randn_like(k)
    causal, grouped = shape.is_causal, shape.heads != shape.key_heads

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    calls: dict[str, Callable[[], object]] = {
        "forward": flash,
        "sums": lambda: triton_head_sums(q, k, is_causal=causal),
        "rows": lambda: triton_row_statistics(q, k, is_causal=causal),
        "identity": lambda: fused_row_entropy(q, k, is_causal=causal),
    }
    error, difference = check(shape, q, k), identity_error(shape, q, k)
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls.values():
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    took = milliseconds(calls, repeats)
    relative = "".join(f"{took[name] / took['forward']:>10.2f}" for name in ("sums", "rows", "identity"))
    return f"{shape!s:<32}{took['forward']:>9.3f}{relative}{error:>12.1e}{difference:>12.1e}"


def interpreted() -> None:
    """Check a small shape in Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported: nothing may have done that yet
    for dtype in (torch.float32, torch.bfloat16):
        q, k = SMOKE.operands("cpu", dtype)
        error, difference = check(SMOKE, q, k), identity_error(SMOKE, q, k)
        if not difference < TOLERANCE:
            sys.exit(f"{SMOKE}: the identity is off by {difference} nats")
        print(f"interpreted, {SMOKE}, {dtype}: off by {error:.1e} nats, the identity by {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="only check a small shape, interpreted")
    parser.add_argument("--repeats", type=int, default=50)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or arguments.smoke:
        if not torch.cuda.is_available():
            print("no CUDA here: nothing is timed")
        interpreted()
        return
    print(
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}, "
        f"{platform.platform()}; bfloat16, median of {arguments.repeats}"
    )
    print(f"{'':<32}{'fwd, ms':>9}{'sums':>10}{'rows':>10}{'identity':>10}{'error':>12}{'identity':>12}")
    for shape in SHAPES:
        print(measure(shape, arguments.repeats), flush=True)
    print("relative to the forward; errors in nats. No launch waited for the device.")


if __name__ == "__main__":
    main()

"""What reading rows costs on the CPU, relative to one fused attention call of the same shape.

`python benchmarks/rows.py`. Prints medians, with quartiles, of ratios to a `F.scaled_dot_product_attention`
forward of the same round, on the attention of the models S1 and S2: all rows (the goal is one fused call), 64
and 32 rows of each sequence, and the forward again, which is the noise of the machine. The order of the calls
is drawn anew in each round; each is made once before it is timed, so that all find the caches warm.
`kernel.py` does this on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from models import CLOCKS, SHAPES, Clock, Shape, machine, timed
from torch import Tensor
from torch.nn import functional as F

from entropy_monitor import measures

COUNTS = (64, 32)
BASE, AGAIN = "one fused forward", "the forward again"


def calls(shape: Shape, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is compared, without gradients, on q, k and v as they come from one projection."""
    generator = torch.Generator().manual_seed(0)
    size = shape.width // shape.heads
    projected = torch.randn(shape.batch, shape.tokens, 3, shape.heads, size, generator=generator, dtype=dtype)
    q, k, v = projected.permute(2, 0, 3, 1, 4)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def reading(rows: Tensor | None) -> Callable[[], object]:
        return lambda: measures.row_statistics(q, k, is_causal=True, rows=rows)

    some = {
        f"{count} rows": reading(measures.stratified_rows(shape.tokens, count, 0))
        for count in COUNTS
        if count < shape.tokens
    }
    return {BASE: forward, AGAIN: forward, "all rows": reading(None), **some}


def compare(shape: Shape, dtype: torch.dtype, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each call in each round."""
    actions = calls(shape, dtype)
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    gc.collect()
    for _ in range(rounds):
        for name in draw.sample(list(actions), len(actions)):
            actions[name]()
            seconds[name].append(timed(actions[name], clock))
    return seconds


def show(label: str, shape: Shape, dtype: torch.dtype, seconds: dict[str, list[float]]) -> None:
    """A table."""
    print(
        f"\n## {label}: {shape.heads} heads of {shape.width // shape.heads}, {shape.tokens} tokens, batch "
        f"{shape.batch}, causal, {str(dtype).removeprefix('torch.')}\n"
    )
    _row(["", "median, ms", "relative to one fused forward"])
    _row(["---"] * 3)
    base = np.array(seconds[BASE])
    for name, values in seconds.items():
        low, middle, high = np.quantile(np.array(values) / base, (0.25, 0.5, 0.75))
        _row([name, f"{1e3 * np.median(values):.2f}", f"{middle:.2f} ({low:.2f} … {high:.2f})"])


def _row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["S1", "S2"])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    shapes = {name: SHAPES[name] for name in options.shapes}
    if options.smoke:
        shapes, options.rounds = {"smoke": Shape(layers=1, width=32, heads=2, tokens=96, batch=2)}, 4
    print(
        f"{machine('cpu')}. Medians of {options.rounds} rounds (quartiles), {options.clock} time. The "
        "forward keeps nothing for a backward."
    )
    for label, shape in shapes.items():
        show(label, shape, dtype, compare(shape, dtype, options.rounds, CLOCKS[options.clock]))


if __name__ == "__main__":
    main()

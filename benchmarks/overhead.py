"""What watching costs: whole training steps, plain and watched, interleaved in one process.

`python benchmarks/overhead.py`. Prints the median time of a step relative to the plain one: of a measured
step, of a step between measurements, and of the default run (a measured step in every 10); `plain again` is
the noise of the machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    layers: int
    width: int
    heads: int
    tokens: int
    batch: int


SHAPES = {
    "S1": Shape(layers=6, width=384, heads=6, tokens=512, batch=4),
    "S2": Shape(layers=4, width=256, heads=4, tokens=2048, batch=1),
    "smoke": Shape(layers=2, width=32, heads=2, tokens=32, batch=2),
}


class Attention(nn.Module):
    """Causal self-attention through the fused kernel."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        self.heads = shape.heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        )


class Block(nn.Module):
    """A pre-LN block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attn = Attention(shape)
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def stepper(shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], Tensor]]:
    """A model, its optimizer, and one training step."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(shape.batch, shape.tokens, shape.width)

    def step() -> Tensor:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return model, optimizer, step


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(shape: Shape, rounds: int, rows: int | str) -> dict[str, float]:
    """Medians of interleaved steps, relative to the plain one."""
    _, _, plain = stepper(shape)
    _, _, again = stepper(shape)
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer, step = stepper(shape)
        watched = em.EntropyMonitor(model, optimizer=optimizer, run_dir=f"{folder}/on", every=2, rows=rows)

        def one() -> None:
            watched.step(step())

        one(), one(), plain(), again()  # warm up; the next watched step is a measured one
        times: dict[str, list[float]] = {"plain": [], "plain again": [], "measured": [], "between": []}
        for _ in range(rounds):
            times["plain"].append(timed(plain))
            times["measured"].append(timed(one))
            times["plain again"].append(timed(again))
            times["between"].append(timed(one))
        watched.close()
    base = statistics.median(times["plain"])
    ratios = {name: statistics.median(values) / base for name, values in times.items()}
    ratios["default run"] = (ratios["measured"] + 9 * ratios["between"]) / 10
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ["smoke"] if options.smoke else ["S1", "S2"]
    print(
        f"torch {torch.__version__}, {options.threads} threads; a plain step = 1, medians of {options.rounds}"
    )
    for name in names:
        for rows in (32, "all"):
            ratios = run(SHAPES[name], options.rounds, rows)
            shown = "  ".join(f"{key} {value:.3f}" for key, value in ratios.items() if key != "plain")
            print(f"{name:5} rows={rows!s:4} {shown}", flush=True)


if __name__ == "__main__":
    main()

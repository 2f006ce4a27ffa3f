"""What reading the weights costs on a measured step, relative to a plain training step of one block.

`python benchmarks/weights.py`. Prints each part's median time as a share of a training step (attention and
MLP, forward, backward and AdamW) of as many tokens as are named; parts and steps take turns. The share for
other numbers of tokens is computed: a step grows in proportion to them (but for the optimizer's part), the
reading of weights does not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entropy_monitor import measures

GOAL = 0.005


@dataclass(frozen=True)
class Shape:
    """One block and its batch."""

    width: int
    heads: int
    tokens: int
    rounds: int


SHAPES = {
    "large": Shape(width=4096, heads=32, tokens=2048, rounds=1),
    "small": Shape(width=384, heads=6, tokens=2048, rounds=15),
    "smoke": Shape(width=96, heads=2, tokens=64, rounds=2),
}


class Block(nn.Module):
    """A pre-LN block with four separate projections."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.width
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
        self.heads = shape.heads

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            m(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def parts(block: Block, shape: Shape) -> dict[str, Callable[[], object]]:
    """What is read of a block's weights, each part on its own."""
    heads = [m.weight.detach().view(shape.heads, -1, shape.width).mT for m in (block.query, block.key)]
    weights = [m.weight.detach() for m in (block.query, block.key, block.value, block.out)]
    starts = [measures.leading_singular_value(w)[1] for w in weights]
    before = [w.clone() for w in weights[:2]]
    update = [w.sign() * 1e-4 + 1e-5 * torch.randn_like(w) for w in weights[:2]]
    gradients = [m.weight.grad for m in (block.query, block.key, block.value, block.out)]
    return {
        "heads' norms": lambda: measures.head_norms(*heads),
        "whole weights (followed)": lambda: [
            measures.leading_singular_value(w, s) for w, s in zip(weights, starts, strict=True)
        ],
        "gradient norms": lambda: [(torch.aminmax(g), torch.linalg.vector_norm(g)) for g in gradients],
        "copies before the step": lambda: [w.clone() for w in weights[:2]],
        "differences": lambda: [torch.sub(w, b, out=b) for w, b in zip(weights[:2], before, strict=True)],
        "update spectra": lambda: [measures.update_spectrum(u) for u in update],
    }


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(name: str, shape: Shape) -> None:
    torch.manual_seed(0)
    block = Block(shape)
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4)
    x = torch.randn(1, shape.tokens, shape.width)

    def step() -> None:
        optimizer.zero_grad()
        block(x).square().mean().backward()
        optimizer.step()

    step()
    actions = {"step": step, **parts(block, shape)}
    times: dict[str, list[float]] = {key: [] for key in actions}
    for action in list(actions.values())[1:]:
        action()
    for _ in range(shape.rounds):
        for key, action in actions.items():
            times[key].append(timed(action))
    medians = {key: statistics.median(values) for key, values in times.items()}
    base = medians.pop("step")
    print(
        f"{name}: width {shape.width}, {shape.heads} heads, {shape.tokens} tokens; step {base * 1e3:.1f} ms"
    )
    for key, value in medians.items():
        print(f"  {key:26} {value / base:8.3%}   {value * 1e3:9.2f} ms")
    total = sum(medians.values()) / base
    longer = total * shape.tokens / 8192
    for tokens, share in ((shape.tokens, total), (8192, longer)):
        verdict = "met" if share <= GOAL else "not met"
        print(f"  {f'all, {tokens} tokens':26} {share:8.3%}   goal {GOAL:.1%}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in ["smoke"] if options.smoke else options.shape or ["small", "large"]:
        run(name, SHAPES[name])


if __name__ == "__main__":
    main()

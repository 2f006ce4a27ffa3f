"""What σReparam costs: whole training steps, plain, with torch's spectral_norm, the textbook's and ours.

`python benchmarks/remedies.py`. All variants take turns in one process; printed are medians over rounds of a
step's time relative to the plain one's of the same round, with the 10th and 90th percentile; `plain again` is
the noise of the machine. Micro-batches are whole batches whose gradients are added up before one optimizer
step.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from models import SHAPES, Block, Shape, timed
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import entropy_monitor as em

WIDE = Shape(layers=2, width=1024, heads=16, tokens=512, batch=2)


class Textbook(nn.Module):
    """σReparam as the paper's pseudo code has it: an iteration in every forward in training."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        u, v = (torch.randn(n, device=weight.device) for n in weight.shape)
        self.register_buffer("u", u / u.norm())
        self.register_buffer("v", v / v.norm())
        self.gamma = nn.Parameter(torch.ones(1, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.u.copy_(nn.functional.normalize(weight @ self.v, dim=0))
                self.v.copy_(nn.functional.normalize(weight.t() @ self.u, dim=0))
        sigma = torch.einsum("d,dc,c->", self.u.clone(), weight, self.v.clone())
        return self.gamma / sigma * weight


def for_each_linear(model: nn.Module, treat: Callable[[nn.Module], object]) -> None:
    for layer in list(model.modules()):
        if isinstance(layer, nn.Linear):
            treat(layer)


def textbook(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Textbook(layer.weight), unsafe=True)


VARIANTS: dict[str, Callable[[nn.Module], object]] = {
    "plain": lambda _: None,
    "plain again": lambda _: None,
    "torch spectral_norm": partial(for_each_linear, treat=parametrizations.spectral_norm),
    "textbook": partial(for_each_linear, treat=textbook),
    "ours": partial(em.sigma_reparam, gamma="preserve"),
}


def stepper(
    shape: Shape, treat: Callable[[nn.Module], object], device: str, compiled: bool
) -> Callable[[int], None]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(Block(shape) for _ in range(shape.layers))).to(device)
    treat(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    run = torch.compile(model) if compiled else model
    x = torch.randn(shape.batch, shape.tokens, shape.width, device=device)

    def step(micro_batches: int) -> None:
        for _ in range(micro_batches):
            run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def measure(
    shape: Shape, rounds: int, device: str, compiled: bool, micro_batches: int
) -> dict[str, list[float]]:
    """Ratios to the plain step of the same round."""
    steps = {name: stepper(shape, treat, device, compiled) for name, treat in VARIANTS.items()}
    names = list(steps)
    for step in steps.values():  # warm up, and compile
        step(1)
        step(1)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        at = i % len(names)
        times = {name: timed(partial(steps[name], micro_batches)) for name in names[at:] + names[:at]}
        for name, seconds in times.items():
            ratios[name].append(seconds / times["plain"])
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=["S1", "wide"], default=["S1", "wide"])
    parser.add_argument("--eager-only", action="store_true", help="leave torch.compile out")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    known = {"S1": SHAPES["S1"], "wide": WIDE}
    shapes = {"smoke": SHAPES["smoke"]} if options.smoke else {name: known[name] for name in options.shapes}
    if options.device == "cuda":
        shapes = {name: replace(shape, batch=16) for name, shape in shapes.items()}
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(f"torch {torch.__version__}, {where}; a plain step = 1, medians of {options.rounds} rounds\n")
    print("| shape | mode | micro-batches | " + " | ".join(list(VARIANTS)[1:]) + " |")
    print("|---" * (len(VARIANTS) + 2) + "|")
    for name, shape in shapes.items():
        for compiled in (False,) if options.eager_only else (False, True):
            for micro_batches in (1, 4):
                ratios = measure(shape, options.rounds, options.device, compiled, micro_batches)
                cells = [_cell(values) for variant, values in ratios.items() if variant != "plain"]
                mode = "compiled" if compiled else "eager"
                print(f"| {name} | {mode} | {micro_batches} | " + " | ".join(cells) + " |", flush=True)


def _cell(values: list[float]) -> str:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return f"{statistics.median(values):.3f} ({low:.3f} … {high:.3f})"


if __name__ == "__main__":
    main()

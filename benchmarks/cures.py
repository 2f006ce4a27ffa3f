"""What helps a run that collapses: the demonstration's too fast run, cured from the start or on the way.

    python benchmarks/cures.py [SEEDS] [--steps STEPS]

Each line is 500 steps with one seed, learning rate 2e-2 and no warmup: as it is; with a remedy from the
start; or converted after some steps, optimizer state carried over, at the same learning rate. Entropy is the
share of its maximum in the first layer and the smallest of the layers, on 256 training images at the end.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

import entropy_monitor as em
from entropy_monitor.demo.digits import CLASSES, PATCH_SIZE, TOKENS, Digits, load_digits
from entropy_monitor.demo.training import BATCH
from entropy_monitor.demo.vit import VisionTransformer

RATE = 2e-2


def plain(model: nn.Module) -> None:
    """As it is."""


def cured(model: nn.Module) -> None:
    """The paper's recipe without layer norms."""
    em.remove_layer_norms(model)
    em.reinitialise(model)
    em.sigma_reparam(model, gamma="one")


def kept_norms(model: nn.Module) -> None:
    """σReparam beside the layer norms."""
    em.reinitialise(model)
    em.sigma_reparam(model, gamma="one")


def run(
    digits: Digits, seed: int, start: Callable[[nn.Module], None], convert_at: int, steps: int
) -> tuple[float, float, float, float]:
    torch.manual_seed(seed)
    model = VisionTransformer(TOKENS, PATCH_SIZE, CLASSES)
    start(model)
    optimizer = torch.optim.AdamW(em.param_groups(model, RATE))
    losses = []
    for step in range(steps):
        if step == convert_at:
            em.sigma_reparam(model, gamma="preserve")
            em.convert_optimizer(optimizer, model)
        batch = torch.randint(0, len(digits.train_x), (BATCH,))
        loss = F.cross_entropy(model(digits.train_x[batch]), digits.train_y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        accuracy = (model(digits.test_x).argmax(-1) == digits.test_y).float().mean().item()
    heads = em.measure(model, digits.train_x[:256])
    share = (heads["entropy"] / heads["max_entropy"]).groupby(heads["layer_index"]).mean()
    return accuracy, sum(losses[-10:]) / 10, share.iloc[0], share.min()


RUNS: list[tuple[str, Callable[[nn.Module], None], int]] = [
    ("as it is", plain, -1),
    ("σReparam, no layer norms, γ = 1", cured, -1),
    ("σReparam, layer norms kept, γ = 1", kept_norms, -1),
    *((f"converted at step {n}, γ = σ", plain, n) for n in (0, 5, 10, 20, 100)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", type=int, nargs="?", default=3)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    digits = load_digits()
    print("| run | seed | test accuracy | final loss | entropy, first layer | lowest layer |")
    print("|---|---|---|---|---|---|")
    for seed in range(options.seeds):
        for name, start, convert_at in RUNS:
            accuracy, loss, first, lowest = run(digits, seed, start, convert_at, options.steps)
            print(
                f"| {name} | {seed} | {accuracy:.0%} | {loss:.2f} | {first:.2f} | {lowest:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()

"""Proposition 3.2 of Zhai et al. 2023 in real Adam runs: spectral norms of updates against the width.

`python benchmarks/proposition_3_2.py`. A network with one hidden layer of width w is trained by Adam to
imitate a fixed random one, with plain linear layers and with ours, γ = 1. Of the hidden weight `[w, w]`, by
width:

- the ideal update Δ = E[g] / √E[g²], moments over fresh batches at the weights of that step: σ(Δ), and the
  bound of the proposition, which must lie below;
- σ(ΔW), the update that Adam made to the plain weight, in units of the learning rate;
- |Δσ(W)|, by how much it changed the spectral norm of the weight that the layer computes with, plain and
  ours.

What Adam did is a mean over ten steps, from the one that is named; all are means over seeds. Exponents are of
a straight line through the logarithms.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entropy_monitor as em
from entropy_monitor import measures

RATE = 1e-3
BATCH, INPUTS, WINDOW = 64, 16, 10


def model_of(width: int, seed: int, *, reparametrized: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )
    if reparametrized:
        em.sigma_reparam(model, gamma="one")
    return model


class Task:
    """Batches of inputs and the outputs of a fixed random network, with noise."""

    def __init__(self, seed: int) -> None:
        self._draws = torch.Generator().manual_seed(1000 + seed)
        self._teacher = torch.randn(INPUTS, 32, generator=self._draws) / math.sqrt(INPUTS)

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(BATCH, INPUTS, generator=self._draws)
        y = (x @ self._teacher).relu().mean(1, keepdim=True)
        return x, y + 0.1 * torch.randn(BATCH, 1, generator=self._draws)


def gradient(model: nn.Sequential, task: Task, weight: Tensor) -> Tensor:
    x, y = task.batch()
    (found,) = torch.autograd.grad(F.mse_loss(model(x), y), weight)
    return found


def ideal_update(model: nn.Sequential, task: Task, weight: Tensor, samples: int) -> tuple[float, float]:
    """σ of E[g] / √E[g²] over fresh batches, and the bound of Proposition 3.2 for the same moments."""
    gradients = torch.stack([gradient(model, task, weight).double() for _ in range(samples)])
    mean, std = gradients.mean(0), gradients.std(0, unbiased=False)
    second = (mean.square() + std.square()).sqrt()
    update = torch.where(second > 0, mean / second, 0.0)
    return (
        float(torch.linalg.matrix_norm(update, 2)),
        float(measures.update_spectral_norm_bound(mean, std)),
    )


def run(width: int, seed: int, at: Sequence[int], samples: int) -> list[dict[str, float]]:
    """Figures of one width after each of some steps."""
    rows: list[dict[str, float]] = [{"width": width, "step": step} for step in at]
    for reparametrized in (False, True):
        model, task = model_of(width, seed, reparametrized=reparametrized), Task(seed)
        layer = model[2]
        weight = layer.parametrizations.weight.original if reparametrized else layer.weight
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        for step in range(1, max(at) + WINDOW):
            x, y = task.batch()
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            before, norm = weight.detach().clone(), effective(layer)
            optimizer.step()
            for row in (row for row in rows if row["step"] <= step < row["step"] + WINDOW):
                change = abs(effective(layer) - norm) / RATE / WINDOW
                key = "effective ours" if reparametrized else "effective plain"
                row[key] = row.get(key, 0.0) + change
                if not reparametrized:
                    update = float(torch.linalg.matrix_norm(weight.detach() - before, 2))
                    row["update"] = row.get("update", 0.0) + update / RATE / WINDOW
                    if step == row["step"]:
                        row["ideal"], row["bound"] = ideal_update(model, task, weight, samples)
    return rows


def effective(layer: nn.Module) -> float:
    """The spectral norm that the layer computes with, exactly."""
    with torch.no_grad():
        if hasattr(layer, "parametrizations"):
            kept = layer.parametrizations.weight
            sigma = kept[0].u @ kept.original @ kept[0].v
            return float(kept[0].gamma / sigma * torch.linalg.matrix_norm(kept.original, 2))
        return float(torch.linalg.matrix_norm(layer.weight, 2))


def _averaged(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def exponent(widths: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log value over log width by least squares."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (widths, values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


COLUMNS = ("ideal", "bound", "update", "effective plain", "effective ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 20, 100])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = [
        row
        for width in options.widths
        for seed in range(options.seeds)
        for row in run(width, seed, options.steps, options.samples)
    ]
    print("| step | width | σ(ideal Δ) | its bound | σ(ΔW)/lr | Δσ(W)/lr, plain | Δσ(Ŵ)/lr, ours |")
    print("|---|---|---|---|---|---|---|")
    for step in options.steps:
        some = [_averaged([r for r in rows if (r["step"], r["width"]) == (step, w)]) for w in options.widths]
        for row in some:
            cells = (f"{row[c]:.2f}" for c in COLUMNS)
            print(f"| {step} | {row['width']:.0f} | " + " | ".join(cells) + " |")
        slopes = (exponent([r["width"] for r in some], [r[c] for r in some]) for c in COLUMNS)
        print(f"| {step} | exponent | " + " | ".join(f"{slope:.2f}" for slope in slopes) + " |")
    below = all(row["bound"] <= row["ideal"] * (1 + 1e-9) for row in rows)
    print(
        f"\nThe bound of Proposition 3.2 lies below σ of the ideal update in all {len(rows)} cases: {below}"
    )


if __name__ == "__main__":
    main()

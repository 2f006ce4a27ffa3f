"""The demonstration's recipes over several seeds: when do alerts open, and does the sound one stay silent?

`python benchmarks/demo_seeds.py --seeds 0 1 2 3 4`. A run takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from entropy_monitor.demo import RECIPES, train
from entropy_monitor.demo.digits import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=500)
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument("--recipes", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    print(f"{'recipe':10} {'seed':>4} {'accuracy':>8} {'loss':>6}  first collapse alert, all alerts")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in (recipe for recipe in RECIPES if recipe.name in options.recipes):
            for seed in options.seeds:
                run_dir = Path(folder) / f"{recipe.name}-{seed}"
                outcome = train(recipe, digits, run_dir, steps=options.steps, seed=seed)
                collapses = [a.opened for a in outcome.alerts if a.kind == "entropy_collapse"]
                first = f"step {min(collapses)}" if collapses else "none"
                print(
                    f"{recipe.name:10} {seed:4} {outcome.accuracy:8.0%} {outcome.loss:6.2f}  "
                    f"{first}, {len(outcome.alerts)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

"""Draws the picture of the README from the demonstration's runs.

`python benchmarks/collapse_figure.py runs/demo`
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

import entropy_monitor as em
from entropy_monitor import figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="what `entropy-monitor demo` wrote")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/collapse.png"))
    options = parser.parse_args()
    whole = Figure(figsize=(18, 5), layout="constrained")
    for part, name in zip(whole.subfigures(1, 3), ("sound", "too-fast", "cured"), strict=True):
        figures.overview(em.load_run(options.demo / name), figure=part)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    whole.savefig(options.out, dpi=100)
    print(options.out)


if __name__ == "__main__":
    main()

"""How the cost of watching grows: with tokens, heads, layers and the length of the run.

    python benchmarks/scale.py [-o scale.png] [--tokens …] [--heads …] [--layers …] [--steps …]

Prints Markdown tables and draws them on logarithmic axes, with the exponents that were fitted to the upper
half of each curve beside those expected: reading 32 rows grows with the tokens, reading all with their
square; what a layer costs however small it is flattens the lower half. Capture is what a measured step adds
to the step of a model that is attention alone, its kernel made free. The run's length is simulated: records
of synthetic figures go to the store, one every 10 steps, of 96 heads each; 10⁶ steps are 10⁷ head-rows. The
longest run is then exported and queried, by DuckDB (`pip install duckdb`) and by pandas, each in a process
of its own.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from models import CLOCKS, Clock, machine
from scale_capture import Added, Size, added_seconds
from scale_figure import Sweep, draw
from scale_store import Queried, Written, query, write_run

from entropy_monitor import ConfigurationError

ROWS: tuple[int | str, ...] = (32, "all")  # "auto" is 32 or more of them
LAYERS_OF_HEADS = 10  # of the sweep over heads
BUDGET = 60.0  # seconds of one measured step above which a curve ends


@dataclass(frozen=True)
class Kind:
    """One sweep of capture: which field of `Size` grows, and from what."""

    title: str
    axis: str
    field: str
    start: Size
    expected: dict[int | str, float]  # exponents, by rows


KINDS = {
    "tokens": Kind(
        "Tokens of a sequence (1 layer, 4 heads)",
        "tokens",
        "tokens",
        Size(heads=4),
        {32: 1, "all": 2},
    ),
    "heads": Kind(
        f"Heads of a model ({LAYERS_OF_HEADS} layers, 64 tokens)",
        "heads",
        "heads",
        Size(tokens=64, layers=LAYERS_OF_HEADS),
        {32: 1, "all": 1},
    ),
    "layers": Kind(
        "Layers of a model (8 heads each, 128 tokens)",
        "layers",
        "layers",
        Size(tokens=128, heads=8),
        {32: 1, "all": 1},
    ),
}


def capture(kind: Kind, sizes: Sequence[int], clock: Clock) -> Sweep:
    """The sweep over `sizes`; prints its table."""
    names = {rows: (f"{rows} rows alone", f"{rows} rows, in full") for rows in ROWS}
    expected = {name: kind.expected[rows] for rows, pair in names.items() for name in pair}
    sweep = Sweep(kind.title, kind.axis, "seconds a measured step adds", sizes, expected)
    for rows, (alone, in_full) in names.items():
        found: list[Added] = []
        for n in sizes:
            size = replace(kind.start, **{kind.field: n // LAYERS_OF_HEADS if kind.field == "heads" else n})
            try:
                found.append(added_seconds(size, rows, clock))
            except ConfigurationError as error:
                print(f"rows={rows}: {error}")
                break
            if found[-1].in_full > BUDGET:
                break
        if found:
            sweep.values[alone] = [added.alone for added in found]
            sweep.values[in_full] = [added.in_full for added in found]
    print(f"\n## {kind.title}\n")
    _row([kind.axis, *(f"{name}, ms" for name in sweep.values)])
    _row(["---"] * (1 + len(sweep.values)))
    for i, n in enumerate(sizes):
        _row([str(n), *(f"{1e3 * v[i]:.1f}" if i < len(v) else "–" for v in sweep.values.values())])
    _row(
        ["exponent (expected)"]
        + [f"{sweep.exponent(name):.2f} ({sweep.expected[name]:g})" for name in sweep.values]
    )
    return sweep


def store(folder: Path, lengths: Sequence[int], clock: Clock) -> Sweep:
    """Write runs of these lengths and query the longest; prints both tables."""
    runs = [write_run(folder / f"run-{steps}", steps, clock) for steps in lengths]
    sweep = Sweep(
        "Length of a run (96 heads, a record every 10 steps)",
        "steps",
        "seconds to write it",
        lengths,
        {"store": 1},
    )
    sweep.values["store"] = [run.seconds for run in runs]
    print("\n## Length of a run\n")
    _row(["steps", "head-rows", "seconds to write", "µs per record of 96 heads", "MB per 10⁶ head-rows"])
    _row(["---"] * 5)
    for run in runs:
        _row(_written(run))
    _row(["exponent (expected)", "", f"{sweep.exponent('store'):.2f} (1)", "", ""])
    longest = folder / f"run-{lengths[-1]}"
    print(f"\n## Queries over {runs[-1].head_rows:.1e} head-rows\n")
    _row(["by", "ready, s", "query, s", "peak memory, MB"])
    _row(["---"] * 4)
    answers = []
    for way, label in (
        ("export", "entropy-monitor export"),
        ("duckdb", "DuckDB over the Parquet files"),
        ("pandas", "em.load_run and pandas"),
    ):
        found = query(longest, way, clock)
        _row([label, *_queried(found)])
        if isinstance(found, Queried) and found.answer:
            answers.append([(layer, head) for layer, head, _ in found.answer])
    if len(answers) > 1:
        print(f"\nBoth answers agree: {answers[0] == answers[1]}.")
    parquet = (longest / "parquet" / "heads.parquet").stat().st_size
    print(f"\nheads.parquet: {parquet / runs[-1].head_rows:.1f} MB per 10⁶ head-rows.")
    return sweep


def _written(run: Written) -> list[str]:
    per_record = 1e6 * run.seconds / (run.head_rows / 96)
    return [
        f"{run.steps:,}",
        f"{run.head_rows:,}",
        f"{run.seconds:.2f}",
        f"{per_record:.0f}",
        f"{run.bytes_per_million / 1e6:.1f}",
    ]


def _queried(found: Queried | str) -> list[str]:
    if isinstance(found, str):
        return [found, "–", "–"]
    return [f"{found.ready:.2f}", f"{found.query:.2f}" if found.answer else "–", f"{found.peak_mb:.0f}"]


def _row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("scale.png"), help="where the figure goes")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, nargs="+", default=[100, 300, 1000, 3000, 10000])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    if options.smoke:
        options.tokens, options.heads, options.layers = [64, 128], [10, 20], [1, 2]
        options.steps = [100, 1000]
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    clock = CLOCKS[options.clock]
    where = f"{machine('cpu')}; {options.clock} time"
    print(where)
    sweeps = [capture(kind, sorted(getattr(options, name)), clock) for name, kind in KINDS.items()]
    with tempfile.TemporaryDirectory() as folder:
        sweeps.append(store(Path(folder), sorted(options.steps), clock))
    draw(sweeps, options.out, where)
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()

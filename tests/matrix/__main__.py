"""`python -m tests.matrix`: run the matrix and write docs/compatibility.md."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.matrix.rules import RULES, Cell
from tests.matrix.table import render

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status is pytest's."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (default docs/compatibility.md)")
    parser.add_argument("-n", "--processes", default="2", help="that share the work (default 2)")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "outcomes.json"
        command = ["-m", "pytest", "-q", "-n", options.processes, "--dist", "loadgroup"]
        command += ["-p", "no:randomly", "--matrix-only", "--matrix-out", str(found)]
        done = subprocess.run([sys.executable, *command, *options.pytest], cwd=ROOT, check=False)
        rows = json.loads(found.read_text("utf-8")) if found.exists() else []
    if not rows:
        print("no test of the matrix ran: the table is left as it was", file=sys.stderr)
        return done.returncode or 1
    groups = list(dict.fromkeys(rule.group for rule in RULES))
    outcomes = {Cell(group, row, column): outcome for group, row, column, outcome in rows if outcome}
    order = sorted(
        outcomes, key=lambda cell: (groups.index(cell.group) if cell.group in groups else 99, cell)
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(render({cell: outcomes[cell] for cell in order}), "utf-8")
    print(options.out)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

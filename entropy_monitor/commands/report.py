"""`entropy-monitor report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from entropy_monitor.commands.base import DONE, Command, add_json, add_runs
from entropy_monitor.commands.progress import Progress
from entropy_monitor.commands.run_paths import run_paths
from entropy_monitor.commands.terminal import out, print_json


class Report(Command):
    """Write one HTML file about one or more runs, to read or to send.

    A summary in words, then the views that `serve` has; it needs nothing beside itself. Prints its path.
    """

    name = "report"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares what it takes."""
        add_runs(parser)
        parser.add_argument(
            "-o", "--out", type=Path, default=Path("report.html"), help="the file (default report.html)"
        )
        parser.add_argument("--force", action="store_true", help="replace the file if it exists")
        add_json(parser, "path and size of the file, and the runs in it")

    def run(self, options: argparse.Namespace) -> int:
        """Writes it."""
        from entropy_monitor.dashboards.report import write_report

        paths = run_paths(options.runs)
        with Progress(1, quiet=options.json) as progress:
            progress.at(f"{len(paths)} run{'s' * (len(paths) != 1)}")
            path = write_report(paths, options.out, overwrite=options.force)
            progress.advance()
        if options.json:
            print_json({"report": path, "bytes": path.stat().st_size, "runs": paths})
        else:
            out(str(path))
        return DONE

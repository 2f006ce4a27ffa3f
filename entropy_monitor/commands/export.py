"""`entropy-monitor export`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from entropy_monitor.commands.base import DONE, Command, add_json, add_runs
from entropy_monitor.commands.progress import Progress
from entropy_monitor.commands.run_paths import run_paths
from entropy_monitor.commands.terminal import print_json


class Export(Command):
    """Write the tables of runs as Parquet, for DuckDB, Spark, Polars.

    Four files a run: heads, layers, scalars and alerts (.parquet). Prints the folder of each run.
    """

    name = "export"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares what it takes."""
        add_runs(parser)
        parser.add_argument(
            "-o",
            "--out",
            type=Path,
            help="folder to write to, of several runs a folder for each in it (default parquet in each RUN)",
        )
        parser.add_argument("--force", action="store_true", help="replace files that exist")
        add_json(parser, "folder and files of each run")

    def run(self, options: argparse.Namespace) -> int:
        """Exports one run after the other."""
        from entropy_monitor.store import export

        paths = run_paths(options.runs)
        places = _places(paths, options.out)
        written = []
        with Progress(len(paths), quiet=options.json) as progress:
            for path, place in zip(paths, places, strict=True):
                progress.at(path)
                folder = export(path, place, overwrite=options.force)
                files = sorted(folder.glob("*.parquet"))
                written.append({"run": path, "folder": folder, "files": files})
                if not options.json:
                    progress.out(str(folder))
                progress.advance()
        if options.json:
            print_json(written)
        return DONE


def _places(paths: list[Path], given: Path | None) -> list[Path | None]:
    """Where each run goes."""
    if given is None or len(paths) == 1:
        return [given] * len(paths)
    places = [path.resolve() for path in paths]
    names = [place.name for place in places]
    if len(set(names)) < len(names):  # seeds of a sweep: as they lie below the folder that holds them all
        names = [str(place.relative_to(os.path.commonpath(places))) for place in places]
    return [given / name for name in names]

"""`entropy-monitor doctor`."""

from __future__ import annotations

import argparse
from typing import ClassVar

from entropy_monitor.commands.base import DONE, FOUND, Command, add_json
from entropy_monitor.commands.progress import Progress
from entropy_monitor.commands.terminal import folded, out, print_json


class Doctor(Command):
    """Say what would be measured of a model, what not, and whether watching changes anything.

    Runs the model a few times with the inputs given, with and without being watched.
    """

    name = "doctor"
    statuses: ClassVar[dict[int, str]] = {
        DONE: "all attention is read, and watching changes nothing",
        FOUND: "something is not covered, faulty or not repeatable",
    }

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares what it takes."""
        parser.add_argument(
            "target", metavar="MODULE:FUNCTION", help="a function that returns (model, inputs)"
        )
        parser.add_argument("--train", action="store_true", help="run a backward pass too, in train mode")
        add_json(parser, "all that was found")

    def run(self, options: argparse.Namespace) -> int:
        """Examines the model."""
        from entropy_monitor.doctor import STAGES, examine

        with Progress(len(STAGES), quiet=options.json) as progress:

            def on_stage(name: str) -> None:
                if name != STAGES[0]:
                    progress.advance()
                progress.at(name)

            found = examine(options.target, train=options.train, on_stage=on_stage)
        if options.json:
            print_json(found.to_dict())
        else:
            for line in str(found).splitlines():
                out(folded(line, " " * 6))
        return DONE if found.is_well else FOUND

"""`entropy-monitor demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from entropy_monitor.commands.base import DONE, Command, add_json
from entropy_monitor.commands.terminal import print_json


class Demo(Command):
    """Train a small model soundly, too fast and cured, and watch it collapse.

    Prints alerts as they open, and at the end where run directories, the report, TensorBoard files and
    offline W&B runs are, and how to open them. Takes a minute or two.
    """

    name = "demo"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares what it takes."""
        parser.add_argument(
            "-o",
            "--out",
            type=Path,
            default=Path("runs/demo"),
            help="folder for what it writes; a numbered one beside it where it exists (default runs/demo)",
        )
        parser.add_argument("--steps", type=_positive, default=500, help="updates of each run (default 500)")
        parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
        add_json(parser, "what was written, and how each run ended; nothing else is printed")

    def run(self, options: argparse.Namespace) -> int:
        """Trains the three runs."""
        import torch

        from entropy_monitor.demo import show_demo

        torch.set_num_threads(1)  # the model is small: more threads only wait for each other
        shown = show_demo(options.out, steps=options.steps, seed=options.seed, quiet=options.json)
        if options.json:
            print_json(shown.to_dict())
        return DONE


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value

"""`entropy-monitor serve`."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import ClassVar

from entropy_monitor.commands.base import DONE, Command, add_json
from entropy_monitor.commands.terminal import out, print_json


class Serve(Command):
    """Show runs in a browser, also while they grow, until Ctrl-C.

    Prints the page's address. It listens on this machine alone unless --host says otherwise, reads nothing
    outside of the folder and writes nothing.
    """

    name = "serve"
    statuses: ClassVar[dict[int, str]] = {DONE: "stopped by Ctrl-C"}

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares what it takes."""
        parser.add_argument(
            "path", type=Path, metavar="RUN_OR_FOLDER", help="a run directory, or a folder with runs in it"
        )
        parser.add_argument(
            "--host",
            default="127.0.0.1",
            help="address to listen at (default 127.0.0.1, this machine alone; there is no password)",
        )
        parser.add_argument(
            "--port", type=int, default=6007, help="port to listen at; 0 takes a free one (default 6007)"
        )
        parser.add_argument("--open", action="store_true", help="open the page in the default browser")
        add_json(parser, "the address, as one line")

    def run(self, options: argparse.Namespace) -> int:
        """Serves until interrupted, which is how it is meant to end."""
        from entropy_monitor.dashboards.web import serve

        def on_ready(address: str) -> None:
            if options.json:
                print_json({"address": address}, one_line=True)
            else:
                out(f"{options.path} at {address} (Ctrl-C ends it)", at_once=True)

        with contextlib.suppress(KeyboardInterrupt):
            serve(
                options.path,
                host=options.host,
                port=options.port,
                open_browser=options.open,
                on_ready=on_ready,
            )
        return DONE

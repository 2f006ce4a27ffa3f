"""What a command of the command line is."""

from __future__ import annotations

import argparse
import inspect
from abc import ABC, abstractmethod
from typing import ClassVar

from entropy_monitor.commands.terminal import wrapped

DONE = 0
FOUND = 1
FAILED = 2
INTERRUPTED = 130
NO_READER = 141

_ALWAYS = {
    FAILED: "the command could not do its work, or was called wrongly; one line on stderr says why",
    INTERRUPTED: "interrupted (Ctrl-C)",
    NO_READER: "what read its output has gone, as in `… | head`",
}


class Command(ABC):
    """One command: a class whose docstring is its help.

    Attributes:
        name: what it is called by.
        statuses: its exit statuses beside those of all commands, and what they mean.
    """

    name: ClassVar[str]
    statuses: ClassVar[dict[int, str]] = {DONE: "done"}

    @classmethod
    def summary(cls) -> str:
        """The first line of its docstring, for the list of commands."""
        return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0].rstrip(".")

    @classmethod
    def description(cls) -> str:
        """All of its docstring, in lines as wide as the terminal."""
        paragraphs = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
        return "\n\n".join(wrapped(paragraph) for paragraph in paragraphs)

    @classmethod
    def epilog(cls) -> str:
        """Its exit statuses."""
        every = (cls.statuses | _ALWAYS).items()
        lines = [wrapped(words, " " * 6, f"  {status:<4}") for status, words in every]
        return "\n".join(["exit status:", *lines])

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares what it takes."""

    @abstractmethod
    def run(self, options: argparse.Namespace) -> int:
        """Does its work and returns the exit status.

        Raises:
            EntropyMonitorError: it could not be done.
            OSError: likewise, for a reason of the system's.
        """


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Declares `--json`, the same for all commands."""
    parser.add_argument("--json", action="store_true", help=f"print JSON: {what}")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Declares one or more runs."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directories, or folders of them: all runs below count"
    )

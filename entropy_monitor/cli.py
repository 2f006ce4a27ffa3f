"""The command line: `entropy-monitor demo | serve | report | compare | check | export | doctor`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from entropy_monitor.commands import COMMANDS
from entropy_monitor.commands.base import FAILED, INTERRUPTED, NO_READER
from entropy_monitor.commands.terminal import error
from entropy_monitor.errors import EntropyMonitorError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. What goes wrong is one line on stderr; a traceback is a bug of ours.

    Args:
        arguments: of the command line; those of the process by default.

    Returns:
        The exit status: 0 all is well, 1 `check` found alerts or `doctor` something that is not covered,
        2 the command could not do its work, 130 it was interrupted, 141 nobody reads its output any more.
    """
    _accept_any_text()
    try:
        options = _parser().parse_args(arguments)
        status = int(options.command.run(options))
        sys.stdout.flush()  # here, where a reader that has gone is no surprise
    except BrokenPipeError:
        _forget_output()
        return NO_READER
    except EntropyMonitorError as problem:
        error(problem)
        return FAILED
    except OSError as problem:
        where = f": {problem.filename}" if problem.filename else ""
        error(f"{problem.strerror or problem}{where}")
        return FAILED
    except KeyboardInterrupt:
        error("interrupted")
        return INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    from entropy_monitor import __version__

    parser = argparse.ArgumentParser(
        prog="entropy-monitor", description="Diagnose Transformer training through attention entropy."
    )
    parser.add_argument("--version", action="version", version=f"entropy-monitor {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for command in COMMANDS:
        own = commands.add_parser(
            command.name,
            help=command.summary(),
            description=command.description(),
            epilog=command.epilog(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(own)
        own.set_defaults(command=command)
    return parser


def _accept_any_text() -> None:
    """Signs that a terminal cannot show become question marks, and no error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


def _forget_output() -> None:
    """Point stdout nowhere, so that the interpreter finds nothing to complain of at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())

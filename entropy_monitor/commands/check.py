"""`entropy-monitor check`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from entropy_monitor.commands.base import DONE, FOUND, Command, add_json, add_runs
from entropy_monitor.commands.progress import Progress
from entropy_monitor.commands.run_paths import names_of, run_paths
from entropy_monitor.commands.terminal import out, print_json, shown, wrapped
from entropy_monitor.records import SEVERITIES, Alert, severity_rank


class Check(Command):
    """List the alerts of runs; fail when severe ones are open.

    A run may still be going on. What could not be read of it is listed as a problem; what is damaged or
    missing fails too.
    """

    name = "check"
    statuses: ClassVar[dict[int, str]] = {
        DONE: "no alert of the severity of --fail-on, or above, is open",
        FOUND: "one is, in at least one of the runs, or a run is damaged: alerts may be lost",
    }

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares what it takes."""
        add_runs(parser)
        parser.add_argument(
            "--fail-on",
            choices=SEVERITIES,
            default="severe",
            help="least severity of an open alert that fails (default severe)",
        )
        add_json(parser, "the alerts of each run in full, and whether it passed")

    def run(self, options: argparse.Namespace) -> int:
        """Reads the alerts alone, whatever the run's size."""
        paths = run_paths(options.runs)
        checked = []
        with Progress(len(paths), quiet=options.json) as progress:
            for name, path in zip(names_of(paths), paths, strict=True):
                progress.at(name)
                checked.append(_check(name, path, options.fail_on))
                progress.advance()
        passed = all(one.passed for one in checked)
        if options.json:
            print_json({"passed": passed, "runs": [vars(one) for one in checked]})
        else:
            _print(checked)
        return DONE if passed else FOUND


@dataclass(frozen=True)
class _Checked:
    name: str
    run: Path
    passed: bool
    problems: Sequence[str]
    alerts: Sequence[Alert]


def _check(name: str, path: Path, fail_on: str) -> _Checked:
    from entropy_monitor.store import FollowedRun, latest_alerts

    run = FollowedRun(path)
    run.verify()
    alerts = latest_alerts(run.events)
    fails = any(a.closed is None and severity_rank(a.severity) >= severity_rank(fail_on) for a in alerts)
    passed = not fails and not run.damage
    return _Checked(name, path, passed, tuple(run.problems), tuple(alerts))


def _print(checked: Sequence[_Checked]) -> None:
    from entropy_monitor.dashboards.verdict import advice

    for one in checked:
        still_open = sum(alert.closed is None for alert in one.alerts)
        count = f"{len(one.alerts)} alert{'s' * (len(one.alerts) != 1)}, {still_open} open"
        out(f"{shown(one.name)}: {count if one.alerts else 'no alert'}")
        for problem in one.problems:
            out(wrapped(f"problem: {problem}", "    ", "  "))
        for alert in one.alerts:
            ended = "still open" if alert.closed is None else f"closed at {alert.closed}"
            line = f"[{alert.severity}] {alert.title} (opened at step {alert.opened}, {ended})"
            out(wrapped(line, "    ", "  "))
    pieces = advice((one.name, one.alerts) for one in checked)
    if pieces:
        out("\nWhat to do:")
        for piece in pieces:
            out(wrapped(piece.text, "  ", "- "))
            if sum(bool(one.alerts) for one in checked) > 1:
                names = dict.fromkeys(reason.partition(": ")[0] for reason in piece.reasons)
                out(wrapped(f"({', '.join(names)})", "  "))

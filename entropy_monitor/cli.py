"""The command line: `entropy-monitor demo | report | check | export | doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from entropy_monitor.errors import EntropyMonitorError
from entropy_monitor.records import SEVERITIES, severity_rank


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; those of the process by default.

    Returns:
        The exit status: 0 all is well, 1 `check` found alerts or `doctor` something that is not covered,
        2 the command could not do its work.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except EntropyMonitorError as error:
        print(f"entropy-monitor: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    from entropy_monitor import __version__

    parser = argparse.ArgumentParser(
        prog="entropy-monitor", description="Diagnose Transformer training through attention entropy."
    )
    parser.add_argument("--version", action="version", version=f"entropy-monitor {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    demo = commands.add_parser("demo", help="train a small model soundly and too fast, and watch it collapse")
    demo.add_argument("-o", "--out", type=Path, default=Path("runs/demo"), help="folder for what it writes")
    demo.add_argument("--steps", type=_positive, default=500, help="updates of each run (default 500)")
    demo.add_argument("--seed", type=int, default=0, help="of weights and batches")
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", help="write one HTML page about one or more runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    report.add_argument(
        "-o", "--out", type=Path, default="report.html", help="the page (default report.html)"
    )
    report.add_argument("--force", action="store_true", help="replace the page if it exists")
    report.set_defaults(run=_report)

    check = commands.add_parser("check", help="list a run's alerts; fails when alerts are open")
    check.add_argument("path", type=Path, metavar="RUN", help="run directory")
    check.add_argument(
        "--fail-on", choices=SEVERITIES, default="severe", help="least severity that fails (default severe)"
    )
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_check)

    export = commands.add_parser("export", help="write a run's tables as Parquet")
    export.add_argument("path", type=Path, metavar="RUN", help="run directory")
    export.add_argument("-o", "--out", type=Path, help="folder to write to (default RUN/parquet)")
    export.add_argument("--force", action="store_true", help="replace files that exist")
    export.set_defaults(run=_export)

    doctor = commands.add_parser(
        "doctor",
        help="say what would be measured of a model, what not, and whether watching changes anything",
    )
    doctor.add_argument("target", metavar="MODULE:FUNCTION", help="a function that returns (model, inputs)")
    doctor.add_argument("--train", action="store_true", help="run a backward pass too, in train mode")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _demo(options: argparse.Namespace) -> int:
    import torch

    from entropy_monitor.demo import show_demo

    torch.set_num_threads(1)  # the model is small: more threads only wait for each other
    show_demo(options.out, steps=options.steps, seed=options.seed)
    return 0


def _report(options: argparse.Namespace) -> int:
    from entropy_monitor.dashboards.report import write_report
    from entropy_monitor.run import load_run

    runs = [load_run(path) for path in options.runs]
    print(write_report(runs, options.out, overwrite=options.force))
    return 0


def _check(options: argparse.Namespace) -> int:
    from entropy_monitor.run import load_run

    run = load_run(options.path)
    alerts = run.alerts.to_dict("records")
    is_open = [alert["closed"] is None or alert["closed"] != alert["closed"] for alert in alerts]
    fails = [
        alert
        for alert, still in zip(alerts, is_open, strict=True)
        if still and severity_rank(alert["severity"]) >= severity_rank(options.fail_on)
    ]
    if options.json:
        print(run.alerts.to_json(orient="records"))
    else:
        print(run)
        for problem in run.problems:
            print(f"problem: {problem}")
        for alert, still in zip(alerts, is_open, strict=True):
            ended = "still open" if still else f"closed at {alert['closed']}"
            print(f"[{alert['severity']}] {alert['title']} (opened at step {alert['opened']}, {ended})")
            print(f"    {alert['advice']}")
        if not alerts:
            print("no alert")
    return 1 if fails else 0


def _export(options: argparse.Namespace) -> int:
    from entropy_monitor.store import export

    print(export(options.path, options.out, overwrite=options.force))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from entropy_monitor.doctor import examine

    found = examine(options.target, train=options.train)
    print(json.dumps(found.to_dict(), indent=1) if options.json else found)
    return 0 if found.is_well else 1


if __name__ == "__main__":
    sys.exit(main())

"""What of a run directory is not a table: its files, documents and logs of alerts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.records import AlertEvent
from entropy_monitor.store import documents
from entropy_monitor.store.events import decode_events
from entropy_monitor.store.layout import FORMAT, RUN_FILE, RunFile, file_path, run_files
from entropy_monitor.store.losses import UNFINISHED

Plans: TypeAlias = Mapping[tuple[int, int], Mapping[str, Any]]
"""What each (session, rank) says that it measured."""


def run_files_of(path: Path) -> list[RunFile]:
    """The files of the run at `path`, in order.

    Raises:
        RunDirectoryError: there is no run.
    """
    expected = f"a directory with a {RUN_FILE}, as RunWriter or EntropyMonitor(run_dir=...) makes it"
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise RunDirectoryError(f"{path} {what}; expected {expected}.")
    files = run_files(path)
    if not files and not (path / RUN_FILE).exists():
        raise RunDirectoryError(f"{path} holds no run; expected {expected}.")
    return files


def read_info(path: Path, problems: list[str]) -> dict[str, Any]:
    """`run.json`; empty, and a problem more, where it is damaged.

    Raises:
        RunDirectoryError: it is of a newer format.
    """
    info = read_document(path / RUN_FILE, problems)
    if info.get("format", FORMAT) > FORMAT:
        raise RunDirectoryError(
            f"the run in {path} has format {info['format']}; this version of entropy-monitor knows "
            f"formats up to {FORMAT}. Upgrade entropy-monitor."
        )
    return info


def read_event_logs(
    files: Sequence[RunFile], problems: list[str]
) -> dict[tuple[int, int], tuple[AlertEvent, ...]]:
    """Every change of an alert, by (session, rank); what is damaged is named in `problems`."""
    logs = {}
    for file in files:
        if file.kind != "alerts":
            continue
        try:
            log = decode_events(file.path.read_bytes())
        except OSError as error:
            problems.append(f"{file.path.name} cannot be read: {error}")
            continue
        logs[file.session, file.rank] = log.events
        problems += [f"{file.path.name}: line {n} is damaged: not read" for n in log.damaged]
        if log.torn:
            problems.append(f"{file.path.name}: its last line has no end: {UNFINISHED}")
    for file in files:
        if file.kind == "heads" and (file.session, file.rank) not in logs:
            log_path = file_path(file.path.parent, "alerts", file.session, file.rank)
            if not log_path.exists():  # every process that writes tables begins a log of alerts before
                problems.append(f"{log_path.name} is missing")
    return logs


def read_plans(files: Sequence[RunFile], problems: list[str]) -> dict[tuple[int, int], dict[str, Any]]:
    """What each rank of each session says that it measured; what is damaged or empty is left out."""
    plans = {
        (file.session, file.rank): read_document(file.path, problems).get("plan", {})
        for file in files
        if file.kind == "plan"
    }
    return {key: plan for key, plan in plans.items() if plan}


def latest_plan(plans: Plans) -> Mapping[str, Any]:
    """That of the lowest rank of the latest session."""
    return plans[min(plans, key=lambda key: (-key[0], key[1]))] if plans else {}


def groups_of(plans: Plans) -> dict[tuple[int, int], int]:
    """For each (session, rank) the lowest of the ranks that worked on the same sequences."""
    return {key: _group(key[1], plan) for key, plan in plans.items()}


def _group(rank: int, plan: Mapping[str, Any]) -> int:
    layers = (layer for layer in plan.values() if isinstance(layer, Mapping))
    return min((int(other) for layer in layers for other in layer.get("ranks", ())), default=rank)


def read_document(path: Path, problems: list[str]) -> dict[str, Any]:
    """A document; empty, and a problem more, where there is none that is sound."""
    try:
        return documents.read(path)
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (documents.DamagedDocumentError, OSError) as error:
        problems.append(str(error))
    return {}

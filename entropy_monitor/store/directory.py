"""Which run a directory holds, and the claim of one rank of one process start on it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.records import RunInfo
from entropy_monitor.store import documents
from entropy_monitor.store.layout import FORMAT, RUN_FILE, RunFile, file_path, run_files

# What tells one launch of a job from the next, and is the same for all of its ranks.
_LAUNCH = (
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
)
_ID = "id"  # a launch that is told by the processes themselves
_CLAIMS = 1000
_ELSEWHERE = "Choose another run_dir"


def check_run_dir(run_dir: str | os.PathLike[str], model: Mapping[str, Any]) -> None:
    """Whether a run of `model` can be kept in `run_dir`; writes nothing.

    A directory that does not exist, or holds no run (whatever else lies there), takes a new run.
    One that holds a run of the same model, parameter for parameter, is continued.

    Args:
        run_dir: the directory.
        model: as in `RunInfo.model`.

    Raises: RunDirectoryError: it is a file, cannot be written, holds another model's run, or a
        damaged one.
    """
    path = Path(run_dir)
    _check_place(path)
    if not path.exists():
        return
    if (path / RUN_FILE).exists():
        _check_model(path, _read_run_file(path), model)
    elif leftovers := run_files(path):
        raise RunDirectoryError(
            f"{path} holds {leftovers[0].path.name} of an earlier run, but no {RUN_FILE}: that run is "
            f"damaged, and nothing of it is overwritten. Put {RUN_FILE} back, or choose another run_dir."
        )


def next_session(
    run_dir: str | os.PathLike[str], model: Mapping[str, Any], rank: int = 0, launch: str = ""
) -> int:
    """The number, from 0, of the session that `rank` would start in `run_dir`; claims nothing.

    Ranks of one launch share a session without talking to each other: a rank joins the session that was
    begun by the same launch if it is not in it yet. Without `launch`, that is told by what the launcher
    put into the environment, which may be the same the next time: then only the latest session counts.

    Raises:
        RunDirectoryError: as in `check_run_dir`.
    """
    check_run_dir(run_dir, model)
    path = Path(run_dir)
    return _next_free(path, rank, _launch(launch)) if path.exists() else 0


def claim_session(run_dir: Path, info: RunInfo, rank: int) -> int:
    """Make or continue the run and take a session of it for `rank`, which no other process can then take.

    Returns:
        The session's number.

    Raises:
        RunDirectoryError: as in `check_run_dir`.
    """
    check_run_dir(run_dir, info.model)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _start_run(run_dir, info)
        return _claim(run_dir, info, rank)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write in {run_dir}: {error}. {_ELSEWHERE}, or make room or rights there."
        ) from error


def _check_place(path: Path) -> None:
    for place in (path, *path.parents):
        if not (place.exists() or place.is_symlink()):
            continue  # another rank may make it at this very moment: asked for in this order
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise RunDirectoryError(
                    f"run_dir {path} cannot be written: no permission in {place}. "
                    f"{_ELSEWHERE}, or change the rights of {place}."
                )
            return
        raise RunDirectoryError(
            f"run_dir {path} cannot be a directory: {place} is there and is none. {_ELSEWHERE}."
        )


def _read_run_file(run_dir: Path) -> dict[str, Any]:
    try:
        run = documents.read(run_dir / RUN_FILE)
    except (documents.DamagedDocumentError, OSError) as error:
        raise RunDirectoryError(
            f"the run in {run_dir} cannot be continued: {error}. Nothing was overwritten. "
            f"Restore {RUN_FILE}, or choose another run_dir."
        ) from error
    if run.get("format", FORMAT + 1) > FORMAT:
        raise RunDirectoryError(
            f"the run in {run_dir} has format {run.get('format')}; this version of entropy-monitor knows "
            f"formats up to {FORMAT}. Upgrade entropy-monitor, or choose another run_dir."
        )
    return run


def _check_model(run_dir: Path, run: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    known = _shapes(run.get("model", {}))
    given = _shapes(model)
    for name in [*given, *known]:
        if known.get(name) != given.get(name):
            there = f"has shape {known[name]}" if name in known else "does not exist"
            here = f"has shape {given[name]}" if name in given else "does not exist"
            raise RunDirectoryError(
                f"{run_dir} holds the run of another model: parameter {name!r} {there} in that run "
                f"and {here} in this model ({len(known)} and {len(given)} parameters in all). {_ELSEWHERE}."
            )


def _shapes(model: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in model.get("parameters", {}).items()}


def _start_run(run_dir: Path, info: RunInfo) -> None:
    payload = {
        "format": FORMAT,
        "created": _now(),
        "model": info.model,
        "options": info.options,
        "versions": info.versions,
    }
    try:
        documents.create(run_dir / RUN_FILE, payload)
    except FileExistsError:
        # It was there before, or another process was faster just now: either way it must be this model's.
        _check_model(run_dir, _read_run_file(run_dir), info.model)


def _claim(run_dir: Path, info: RunInfo, rank: int) -> int:
    launch = _launch(info.launch)
    payload = {
        "started": _now(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "launch": launch,
        "options": info.options,
        "versions": info.versions,
    }
    for _ in range(_CLAIMS):
        session = _next_free(run_dir, rank, launch)
        try:
            documents.create(file_path(run_dir, "session", session, rank), payload)
        except FileExistsError:
            continue
        return session
    raise RunDirectoryError(
        f"{_CLAIMS} sessions of {run_dir} in a row were taken by other processes. {_ELSEWHERE}."
    )


def _next_free(run_dir: Path, rank: int, launch: Mapping[str, str]) -> int:
    files = run_files(run_dir)
    if not files:
        return 0
    latest = files[-1].session
    sessions = range(latest, -1, -1) if _ID in launch else (latest,)
    for session in sessions:
        members = [file for file in files if file.session == session]
        joined = any(file.rank == rank for file in members)
        if not joined and _started_by(members, launch):
            return session
    return latest + 1


def _started_by(members: list[RunFile], launch: Mapping[str, str]) -> bool:
    for file in members:
        if file.kind == "session":
            try:
                return bool(documents.read(file.path).get("launch") == launch)
            except (documents.DamagedDocumentError, OSError):
                continue
    return False


def _launch(launch: str) -> dict[str, str]:
    if launch:
        return {_ID: launch}
    return {name: os.environ[name] for name in _LAUNCH if name in os.environ}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""`RunWriter`: the sink that keeps a run in its directory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entropy_monitor.errors import ConfigurationError, RunDirectoryError
from entropy_monitor.records import AlertEvent, Record, RunInfo, Sink
from entropy_monitor.store import documents
from entropy_monitor.store.appending import SessionFiles
from entropy_monitor.store.directory import claim_session
from entropy_monitor.store.layout import FORMAT
from entropy_monitor.store.plain import to_json


class RunWriter(Sink):
    """Keeps what one process measures: three tables and a log of alerts, in files of its own.

    Records are held in memory and written as one batch when `flush_seconds` have passed since the
    last one, or `flush_every` are held, whichever is first; so records that come rarely are written
    at once. An alert is written at once, after the records before it. What was written survives the
    death of the process.

    The first OSError of a write is raised; from then on this writer is silent and writes nothing:
    it is for the caller to say so. `failure` keeps the error. The batch that failed is not in the
    file, not even in part.

    Args: run_dir: the directory. Created if need be; a run of the same model in it is continued.
        rank: of this process; each rank has files of its own. flush_every: most records held.
        flush_seconds: a record that comes this long after the last write is written at once, with
        all held.

    Attributes:
        run_dir: the directory.
        rank: of this process.
        session: which process start of the run this is, from 0; known once open.
        failure: the error that ended the writing, if any.

    Raises:
        ConfigurationError: `rank` or `flush_seconds` is negative, or `flush_every` is below 1.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        rank: int = 0,
        flush_every: int = 64,
        flush_seconds: float = 1.0,
    ) -> None:
        for name, value, least in (
            ("rank", rank, 0),
            ("flush_every", flush_every, 1),
            ("flush_seconds", flush_seconds, 0),
        ):
            if not value >= least:
                raise ConfigurationError(f"{name} must be at least {least}; it is {value}")
        self.run_dir = Path(run_dir)
        self.rank = rank
        self.session: int | None = None
        self.failure: OSError | None = None
        self._flush_every = flush_every
        self._flush_seconds = flush_seconds
        self._files: SessionFiles | None = None
        self._held = 0
        self._flushed_at = float("-inf")

    def open(self, info: RunInfo) -> None:
        """Make or continue the run, and begin a session of it.

        The session is the next free one (`session` says which), whatever `info.session` says.

        Raises:
            RunDirectoryError: the directory is another model's, damaged, or cannot be written.
            RuntimeError: this writer was opened before.
        """
        if self.session is not None:
            raise RuntimeError("this RunWriter was opened before: make a new one for each session")
        session = claim_session(self.run_dir, info, self.rank)
        metadata = {
            "entropy_monitor.format": str(FORMAT),
            "entropy_monitor.session": str(session),
            "entropy_monitor.rank": str(self.rank),
            "entropy_monitor.options": to_json(info.options),
        }
        try:
            self._files = SessionFiles(self.run_dir, session, self.rank, metadata)
            self.session = session
            if info.plan:
                self.describe(info.plan)
        except OSError as error:
            self._abandon()
            raise RunDirectoryError(
                f"cannot write in {self.run_dir}: {error}. Make room there, or choose another run_dir."
            ) from error

    def describe(self, plan: Mapping[str, Any]) -> None:
        """Keep what is measured and how; may come late and more than once, the last one counts.

        Raises:
            OSError: it cannot be written.
        """
        self._write(lambda files: documents.replace(files.plan_path, {"plan": plan}))

    def log(self, record: Record) -> None:
        """Keep a record, in memory until the next write.

        Raises:
            OSError: a write failed.
            ValueError: the record's columns are not those of its tables.
            TypeError: a column's values do not fit its type.
        """
        self._write(lambda files: self._log(files, record))

    def alert(self, event: AlertEvent) -> None:
        """Write a change of an alert, and before it whatever is held.

        Raises:
            OSError: a write failed.
        """
        self._write(lambda files: files.append_event(event))

    def flush(self) -> None:
        """Write whatever is held.

        Raises:
            OSError: a write failed.
        """
        self._write(self._flush)

    def close(self) -> None:
        """Write whatever is held and end the files; a second time does nothing.

        Raises:
            OSError: a write failed.
        """
        files, self._files = self._files, None
        if files is not None:
            files.close()

    def _write(self, action: Callable[[SessionFiles], None]) -> None:
        if self.failure is not None:
            return
        if self._files is None:
            state = "is not open: call open(info) first" if self.session is None else "is closed"
            raise RuntimeError(f"this RunWriter {state}")
        try:
            action(self._files)
        except OSError as error:
            self.failure = error
            self._abandon()
            raise

    def _log(self, files: SessionFiles, record: Record) -> None:
        files.append(record)
        self._held += 1
        waited = time.monotonic() - self._flushed_at
        if self._held >= self._flush_every or waited >= self._flush_seconds:
            self._flush(files)

    def _flush(self, files: SessionFiles) -> None:
        files.flush()
        self._held = 0
        self._flushed_at = time.monotonic()

    def _abandon(self) -> None:
        files, self._files = self._files, None
        if files is not None:
            files.abandon()

"""`export`: a run as Parquet files, for DuckDB, Spark, Polars."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from entropy_monitor.errors import RunDirectoryError
from entropy_monitor.records import AlertEvent
from entropy_monitor.store.merge import latest_alerts
from entropy_monitor.store.plain import to_json
from entropy_monitor.store.reader import read_run

logger = logging.getLogger("entropy_monitor")

_ALERTS = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("severity", pa.string()),
        ("layer", pa.string()),
        ("heads", pa.list_(pa.int64())),
        ("opened", pa.int64()),
        ("updated", pa.int64()),
        ("closed", pa.int64()),
        ("title", pa.string()),
        ("message", pa.string()),
        ("advice", pa.string()),
        ("evidence", pa.string()),
    ]
)


def export(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `heads`, `layers`, `scalars` and `alerts` (last states, evidence as JSON) as `.parquet`.

    The files hold what `read_run` returns, with `run.json` in their metadata. Each appears whole or
    not at all.

    Args:
        run_dir: the run.
        out: the folder to write to; by default `parquet` in the run's directory.
        overwrite: whether files of these names may be replaced.

    Returns:
        The folder.

    Raises:
        RunDirectoryError: there is no run, a file is there already and `overwrite` is False, or the folder
            cannot be written.
    """
    folder = Path(run_dir) / "parquet" if out is None else Path(out)
    data = read_run(run_dir)
    tables = {
        "heads": data.heads,
        "layers": data.layers,
        "scalars": data.scalars,
        "alerts": _alerts_table(data.alerts),
    }
    present = [f"{name}.parquet" for name in tables if (folder / f"{name}.parquet").exists()]
    if present and not overwrite:
        raise RunDirectoryError(
            f"{folder} holds {', '.join(present)} already. Choose another folder, or replace them with "
            "overwrite=True (on the command line: --force)."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot make the folder {folder}: {error}. Choose another.") from error
    if data.problems:
        logger.warning(
            "the export of %s lacks what could not be read: %s", data.path, "; ".join(data.problems)
        )
    metadata = {"entropy_monitor.run": to_json(data.info)}
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        try:
            _write(path, table.replace_schema_metadata(metadata))
        except OSError as error:
            raise RunDirectoryError(f"cannot write {path}: {error}. Choose another folder.") from error
    return folder


def _write(path: Path, table: pa.Table) -> None:
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    others = [field.name for field in table.schema if field.name not in floats]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            # Readings hardly repeat: their bytes compress better apart, all else better as a dictionary.
            use_byte_stream_split=floats or False,
            use_dictionary=[name for name in others if name != "heads"],
        )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _alerts_table(events: Sequence[AlertEvent]) -> pa.Table:
    rows = [
        {
            **{name: getattr(alert, name) for name in _ALERTS.names},
            "heads": list(alert.heads),
            "evidence": to_json(alert.evidence),
        }
        for alert in latest_alerts(events)
    ]
    return pa.Table.from_pylist(rows, schema=_ALERTS)

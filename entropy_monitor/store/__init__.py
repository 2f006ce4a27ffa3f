"""The run directory: append, read, recover, export.

| file | what it holds |
|---|---|
| `run.json` | what ran: model (parameter names and shapes), options, versions. Written once. |
| `session-<session>-<rank>.json` | who started this session, when, with which options. Written once. |
| `plan-<session>-<rank>.json` | what is measured and how, known after the first forward. |
| `heads-`, `layers-`, `scalars-<session>-<rank>.arrows` | the tables, as Arrow IPC streams. Only grow. |
| `levels-<session>-<rank>.arrows` | `heads` in blocks, for long runs; 4 to 9 % of its size. |
| `alerts-<session>-<rank>.jsonl` | every change of an alert, a line each. Only grows. |

`RunReader` and `read_run` read everything, as rows. `FollowedRun` is for whoever looks again and again: it
reads single columns of `heads`, `layers` and `levels`, as arrays (`cubes`).

Every process start has files of its own. JSON documents and lines carry a CRC-32 of their content,
Arrow messages one of all their bytes (`framing`): what was changed is found, and costs the message,
line or document it is in.
"""

from entropy_monitor.store.cubes import Cubes
from entropy_monitor.store.dataframes import alerts_frame, table_frame
from entropy_monitor.store.directory import check_run_dir, next_session
from entropy_monitor.store.exporting import export
from entropy_monitor.store.finding import find_runs
from entropy_monitor.store.followed_run import FollowedRun
from entropy_monitor.store.merge import latest_alerts
from entropy_monitor.store.places import Place
from entropy_monitor.store.reader import RunData, RunReader, Session, read_run
from entropy_monitor.store.writer import RunWriter

__all__ = [
    "Cubes",
    "FollowedRun",
    "Place",
    "RunData",
    "RunReader",
    "RunWriter",
    "Session",
    "alerts_frame",
    "check_run_dir",
    "export",
    "find_runs",
    "latest_alerts",
    "next_session",
    "read_run",
    "table_frame",
]

"""One HTML file about one or several runs, to read or to send: no server, no request, nothing beside it."""

from __future__ import annotations

import base64
import gzip
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources, util
from pathlib import Path
from typing import Protocol, runtime_checkable

from entropy_monitor.dashboards.packing import pack
from entropy_monitor.dashboards.report_data import expected_bytes, report_data
from entropy_monitor.dashboards.run_view import RunView
from entropy_monitor.dashboards.verdict import WORST_FIRST, advice, gravest, headline, history
from entropy_monitor.dashboards.web.assets import plotly_script, static_text
from entropy_monitor.dashboards.web.joined import joined_modules
from entropy_monitor.errors import ConfigurationError, MissingExtraError
from entropy_monitor.phrases import number
from entropy_monitor.records import severity_rank

MOST_BYTES = 8_000_000
"""What a report weighs at most; of large runs it shows fewer steps instead."""

_STAGES = ((500, False), (250, False), (125, False), (60, False), (60, True), (30, True), (15, True))
"""Most steps of each run, and whether only the main figures are shown; the first that fits is taken."""

_MOST_EVENTS = 20
_MOST_ADVICE = 6
_VERDICTS = {"sound": "sound", "watch": "worth a look", "trouble": "in trouble", "unknown": "unknown"}


@runtime_checkable
class _HasPath(Protocol):
    @property
    def path(self) -> Path: ...


def write_report(
    runs: Iterable[object] | object,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = True,
    most_bytes: int = MOST_BYTES,
) -> Path:
    """Writes a self-contained HTML page about runs: a summary in words, then the views that `serve` has.

    Args:
        runs: a run directory, a run as `entropy_monitor.load_run` returns it, or several of these to compare.
        path: the file to write; missing folders are made.
        overwrite: whether a file that is there may be replaced.
        most_bytes: what the file weighs at most. Of runs of more than 500 measured steps, or of very many
            heads, stretches of steps are shown by their extremes.

    Returns:
        The file's path. It is written whole or not at all.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed.
        RunDirectoryError: there is no run at one of the places.
        ConfigurationError: there are no runs, they cannot be shown within `most_bytes`, `path` is a folder or
            cannot be written, or it exists and `overwrite` is False.
    """
    if util.find_spec("jinja2") is None:
        raise MissingExtraError("jinja2", "report", "the HTML report")
    script = plotly_script()
    folders = _folders(runs)
    target = Path(path)
    with _writing(target):
        _check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
    page = _fitting(folders, script, most_bytes)
    with _writing(target):
        _replace(target, page)
    return target


def _folders(runs: Iterable[object] | object) -> list[Path]:
    several = isinstance(runs, Iterable) and not isinstance(runs, (str, os.PathLike, _HasPath))
    found = []
    for run in runs if several else [runs]:  # type: ignore[attr-defined]
        place = run.path if isinstance(run, _HasPath) and not isinstance(run, Path) else run
        if not isinstance(place, (str, os.PathLike)):
            raise ConfigurationError(f"a run is a run directory or what load_run returns, not {place!r}")
        found.append(Path(place))
    if not found:
        raise ConfigurationError("runs is empty; give at least one run to report on")
    return found


def _fitting(folders: Sequence[Path], script: bytes, most_bytes: int) -> str:
    """The page with as many steps and figures as fit."""
    names = _names(folders)
    views = {name: RunView(folder, name) for folder, name in zip(folders, names, strict=True)}
    for view in views.values():
        view.verify()
    packed_script, size = _packed(script), most_bytes
    for positions, main_only in _STAGES:
        if len(packed_script) + 0.6 * expected_bytes(views, positions, main_only=main_only) > most_bytes:
            continue
        page = render(views, packed_script, positions, main_only=main_only)
        size = len(page.encode())
        if size <= most_bytes:
            return page
    raise ConfigurationError(
        f"a report of {len(folders)} runs of this size weighs more than {size / 1e6:.1f} MB even with "
        f"{_STAGES[-1][0]} steps each, and {most_bytes / 1e6:.1f} MB are allowed; report on fewer runs, "
        "or give a larger most_bytes"
    )


def render(views: Mapping[str, RunView], script: str, positions: int, *, main_only: bool = False) -> str:
    """The report as HTML text. Whatever comes from a run is escaped.

    Args:
        views: the runs by their ids.
        script: plotly's, packed.
        positions: most steps of each run.
        main_only: whether of heads only the figures that say most are shown.
    """
    from jinja2 import Environment, StrictUndefined

    here = resources.files(__package__ or "entropy_monitor.dashboards")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(number=cell, spans=_spans)
    template = environment.from_string(here.joinpath("report.html").read_text("utf-8"))
    alerts = [(view.name, view.alerts) for view in views.values()]
    digests = sorted((view.digest for view in views.values()), key=lambda d: WORST_FIRST.index(d.verdict))
    events, pieces = history(alerts), advice(alerts)
    worst = sorted(events, key=lambda event: -severity_rank(event.severity))[:_MOST_EVENTS]
    data = report_data(views, ", ".join(digest.name for digest in digests), positions, main_only=main_only)
    return template.render(
        css=static_text("style.css") + here.joinpath("report.css").read_text("utf-8"),
        headline=headline(digests),
        digests=digests,
        verdicts=_VERDICTS,
        causes=[(name, seen) for name, found in alerts if (seen := gravest(found)) is not None],
        problems=[(view.name, view.problems) for view in views.values() if view.problems],
        events=[event for event in events if event in worst],
        more_events=max(0, len(events) - _MOST_EVENTS),
        advice=pieces[:_MOST_ADVICE],
        more_advice=len(pieces) > _MOST_ADVICE,
        remarks=[_remark(view, positions) for view in views.values() if view.digest.measured > positions],
        plotly=script,
        data=_packed(pack(data)),
        script=joined_modules("report", lambda name: static_text(f"{name}.js")),
    )


def cell(value: object) -> str:
    """What stands in a table: floats as `phrases.number`, whole numbers in full, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else number(value)


def _spans(text: str) -> list[tuple[bool, str]]:
    """A text in pieces, and of each whether it is code, which stands between backticks."""
    return [(i % 2 == 1, piece) for i, piece in enumerate(text.split("`")) if piece]


def _remark(view: RunView, positions: int) -> str:
    return (
        f"{view.name}: {view.digest.measured:,} measured steps are shown as {positions} stretches, each by "
        "its least and largest values."
    )


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, compresslevel=6, mtime=0)).decode("ascii")


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names; those that several share with their paths."""
    names = [folder.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    ]


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise ConfigurationError(
            f"path is the folder {target}; name a file in it, such as {target / 'report.html'}"
        )
    if target.exists() and not overwrite:
        raise ConfigurationError(
            f"{target} exists; choose another path, or replace it with overwrite=True "
            "(on the command line: --force)"
        )


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        at = f" ({error.filename})" if error.filename else ""
        raise ConfigurationError(
            f"cannot write the report to {target}: {error.strerror or error}{at}; "
            "choose a path that can be written"
        ) from error


def _replace(target: Path, page: str) -> None:
    """Writes beside the target and moves it there, so that a reader never sees half a page."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)

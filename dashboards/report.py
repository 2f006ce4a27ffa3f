"""One HTML file about one or several runs, to read, send or print: no server, no script, no request."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import resources, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entropy_monitor.dashboards.digest import (
    Digest,
    advice,
    alert_rows,
    digest,
    headline,
    history,
    percent,
)
from entropy_monitor.dashboards.report_figures import compared, drawn, map_image
from entropy_monitor.errors import ConfigurationError, MissingExtraError
from entropy_monitor.phrases import number, ranges, times

if TYPE_CHECKING:
    import pandas as pd

    from entropy_monitor.frames import RunTables

_MOST_CARDS = 24
_MOST_EVENTS = 40
_MOST_PLAN_ROWS = 200

_EVIDENCE = {
    "entropy": "entropy (nats)",
    "entropy_se": "standard error of the entropy (nats)",
    "max_entropy": "maximal entropy (nats)",
    "entropy_share": "entropy / maximum",
    "share_at_start": "entropy / maximum at the start",
    "opened_share": "entropy / maximum when it opened",
    "start_step": "step of the first reading",
    "below_floor": "nats below a floor",
    "max_logit": "largest logit",
    "max_logit_at_start": "largest logit at the start",
    "max_logit_growth": "largest logit / its first value",
    "max_logit_layer": "largest logit of the layer",
    "floor_row": "floor from each row's logits (nats)",
    "floor_activation": "floor from the norms of q and k (nats)",
    "floor_weights": "floor from weights and inputs (nats)",
    "sigma_q": "σ(W_Q)",
    "sigma_k": "σ(W_K)",
    "sigma_qk": "σ(W_K W_Qᵀ)",
    "sigma_qk_at_start": "σ(W_K W_Qᵀ) at the start",
    "sigma_qk_growth": "σ(W_K W_Qᵀ) / its first value",
    "grad_linf": "largest attention gradient",
    "grad_linf_at_start": "largest attention gradient at the start",
    "grad_linf_growth": "largest attention gradient / its first value",
    "grad_l2": "norm of the attention gradient",
    "update_sigma": "σ of the last update",
    "update_entropy": "spectral entropy of the last update (nats)",
    "loss": "loss",
    "loss_at_start": "loss at the start",
    "layers": "layers",
    "uniform_layers": "uniform layers",
    "worst_head": "worst head",
}
_COUNTS = {"start_step", "layers", "uniform_layers", "worst_head"}


def write_report(
    runs: Iterable[RunTables] | RunTables, path: str | os.PathLike[str], *, overwrite: bool = True
) -> Path:
    """Writes a self-contained HTML page about runs: a summary in words, a table, figures, every alert.

    Args:
        runs: one run, or several to compare, as `entropy_monitor.load_run` returns them.
        path: the file to write; missing folders are made.
        overwrite: whether a file that is there may be replaced.

    Returns:
        The file's path. It is written whole or not at all.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        ConfigurationError: there are no runs, `path` is a folder or cannot be written, or it exists
            and `overwrite` is False.
    """
    for package in ("matplotlib", "jinja2"):
        if util.find_spec(package) is None:
            raise MissingExtraError(package, "report", "the HTML report")
    chosen = list(runs) if isinstance(runs, Iterable) else [runs]
    if not chosen:
        raise ConfigurationError("runs is empty; give at least one run to report on")
    target = Path(path)
    with _writing(target):
        _check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
    page = render(_told_apart(chosen))
    with _writing(target):
        _replace(target, page)
    return target


def render(runs: Sequence[RunTables]) -> str:
    """The report as HTML text. Whatever comes from a run is escaped."""
    from jinja2 import Environment, StrictUndefined

    here = resources.files(__package__ or "entropy_monitor.dashboards")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters.update(number=cell, percent=percent, times=times)
    template = environment.from_string(here.joinpath("report.html").read_text("utf-8"))
    events, digests = history(runs), [digest(run) for run in runs]
    return template.render(
        css=here.joinpath("report.css").read_text("utf-8"),
        headline=headline(digests),
        digests=digests,
        events=events[:_MOST_EVENTS],
        more_events=max(0, len(events) - _MOST_EVENTS),
        advice=advice(runs),
        comparison=compared(runs),
        runs=[_run_section(run, summed) for run, summed in zip(runs, digests, strict=True)],
        verdicts={
            "sound": "sound",
            "watch": "worth a look",
            "trouble": "in trouble",
            "unknown": "unknown",
        },
    )


def cell(value: object) -> str:
    """What stands in a table: floats as `phrases.number`, whole numbers in full, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else number(value)


def _run_section(run: RunTables, summed: Digest) -> dict[str, Any]:
    ranked = alert_rows(run)
    cards = sorted(ranked[:_MOST_CARDS], key=lambda a: a["opened"])
    plan = [(str(layer), _flat(how)) for layer, how in _items(run.plan)]
    return {
        "digest": summed,
        "path": str(run.path),
        "problems": [str(problem) for problem in run.problems],
        "figures": drawn(run, summed),
        "cards": [_card(alert) for alert in cards],
        "more_cards": len(ranked) - len(cards),
        "facts": [(key, _flat(value)) for key, value in _items(run.info) if _flat(value)],
        "plan": plan[:_MOST_PLAN_ROWS],
        "more_plan": max(0, len(plan) - _MOST_PLAN_ROWS),
    }


def _card(alert: Mapping[str, Any]) -> dict[str, Any]:
    evidence = dict(alert["evidence"] or {})
    image = map_image(evidence.pop("map", None))
    call = evidence.pop("call", 0)
    figures = [
        (_EVIDENCE.get(key, key.replace("_", " ")), _evidence_text(key, value))
        for key, value in evidence.items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
    ]
    worst = f"head {evidence['worst_head']}" if "worst_head" in evidence else "the worst head"
    return {
        **{key: str(alert[key]) for key in ("severity", "title", "message", "advice", "layer")},
        "heads": ranges(alert["heads"]),
        "opened": int(alert["opened"]),
        "updated": int(alert["updated"]),
        "closed": alert["closed"],
        "evidence": figures,
        "image": image,
        "alt": f"Attention map of {worst} of {alert['layer']}" + (f", call {call}" if call else ""),
    }


def _evidence_text(key: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    if key in _COUNTS:
        return f"{value:,.0f}"
    if "share" in key:
        return percent(value)
    return times(value) if key.endswith("_growth") else cell(value)


def _items(mapping: Any) -> list[tuple[str, Any]]:
    return [(str(key), value) for key, value in mapping.items()] if mapping else []


def _flat(value: Any) -> str:
    """Options, versions or a plan's entry on one line; parameter shapes, which are long, as their number."""
    if isinstance(value, Mapping):
        parts = []
        for key, inner in value.items():
            text = f"{len(inner)}" if key == "parameters" else _flat(inner)
            parts.append(f"{key}: {text}")
        return ", ".join(parts)
    if isinstance(value, (list, tuple)):
        return " ".join(_flat(inner) for inner in value)
    return "–" if value is None else str(value)


def _told_apart(runs: Sequence[RunTables]) -> list[RunTables]:
    """The runs, those that share a name with another one named by their path."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else _Renamed.of(run) for run in runs]


@dataclass(frozen=True)
class _Renamed:
    name: str
    path: Path
    heads: pd.DataFrame
    layers: pd.DataFrame
    scalars: pd.DataFrame
    alerts: pd.DataFrame
    info: Any
    plan: Any
    problems: Sequence[str]

    @classmethod
    def of(cls, run: RunTables) -> _Renamed:
        values = {field.name: getattr(run, field.name) for field in fields(cls)}
        return cls(**{**values, "name": str(run.path)})


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

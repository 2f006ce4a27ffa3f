"""Tables in markdown: what the figures are, which layer an index stands for, and the alerts of a run."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence

from entropy_monitor.dashboards.head_pictures import COLOURS, FIGURES
from entropy_monitor.records import Alert
from entropy_monitor.trackers.aggregates import HEAD_METRICS, LAYER_METRICS, metric_words

MOST_ALERTS = 200
"""Most rows of the alert table, which is written anew at each change."""

_SPECIAL = re.compile(r"[!-$&'*<>?@\[-`{-~]")  # ASCII signs that markdown or HTML may read something into


def escape(text: str) -> str:
    """Text that markdown shows as it is, on one line: markup in it becomes character references."""
    return _SPECIAL.sub(lambda match: f"&#{ord(match.group())};", " ".join(text.split()))


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table of escaped cells."""
    lines = [header, ["---"] * len(header), *([escape(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def layer_table(layers: Mapping[int, str], charted: Container[int]) -> str:
    """Index and qualified name of each layer, and whether it has scalars and charts of its own."""
    rows = ((index, name, "yes" if index in charted else "no") for index, name in sorted(layers.items()))
    return table(("index", "layer", "charts"), rows)


def figure_table() -> str:
    """What the scalars, pictures and histograms are."""
    return table(
        ("name", "what it is"),
        [
            ("all/…", "the whole model: mean, least or largest over all heads"),
            *((f"layer_…/{metric}", metric_words(metric)) for metric in (*HEAD_METRICS, *LAYER_METRICS)),
            *((f"{name}, heads/{name}", words) for name, words in FIGURES.items()),
            ("the pictures among these", COLOURS),
        ],
    )


def alert_table(alerts: Sequence[Alert]) -> str:
    """A row for each alert, the newest first; beyond `MOST_ALERTS`, the oldest are only counted."""
    shown = list(reversed(alerts))[:MOST_ALERTS]
    # Few columns, all of text: TensorBoard breaks what stands in narrow ones letter by letter.
    text = table(
        ("alert", "what was seen", "what to do"),
        (
            (f"{alert.title} - {alert.severity}, {_state(alert)}", alert.message, alert.advice)
            for alert in shown
        ),
    )
    hidden = len(alerts) - len(shown)
    return text if hidden == 0 else f"{text}\n\nand {hidden} older alerts"


def _state(alert: Alert) -> str:
    if alert.closed is None:
        return f"open since step {alert.opened}"
    return f"opened at step {alert.opened}, closed at step {alert.closed}"

"""The pictures of a report: figures as data URIs, with a text for those who cannot see them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

from entropy_monitor.dashboards.digest import Digest, alert_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from entropy_monitor.frames import RunTables

_SVG_LIMIT = 120_000
"""Bytes from which a figure is embedded as PNG: long runs make vector curves large."""


def compared(runs: Sequence[RunTables]) -> dict[str, str] | None:
    """Several runs on common axes, as in `drawn`; None for a single one."""
    if len(runs) < 2:
        return None
    from entropy_monitor import figures

    return {
        "image": _image(figures.compare(runs)),
        "alt": "Three plots over training steps: loss, entropy as a share of its maximum, and the "
        f"largest spectral norm of W_K W_Q transposed, a line for each of {len(runs)} runs.",
        "caption": "Solid: mean over all heads. Dotted: the lowest head at each step.",
    }


def drawn(run: RunTables, summed: Digest) -> list[dict[str, str]]:
    """One run's figures: `image` (a data URI), `alt` and `caption` each."""
    from entropy_monitor import figures

    shown = [
        {
            "image": _image(figures.overview(run)),
            "alt": f"Loss and attention entropy of {run.name} over training steps, with "
            f"{len(run.alerts)} alerts marked.",
            "caption": "Lines: mean over a layer's heads, in a band from the lowest to the highest "
            "head. Dashed: alerts, at the step they opened.",
        }
    ]
    if not summed.measured:
        return shown
    shown.append(
        {
            "image": _image(_figure(figures.heatmap(run))),
            "alt": f"Entropy over its maximum of every head of {run.name}, as colour, over steps.",
            "caption": "Dark: attention on few keys. Grey: not known.",
        }
    )
    worst = _worst_head(run, summed)
    if worst is not None:
        layer, head, call = worst
        shown.append(
            {
                "image": _image(_figure(figures.floors(run, layer, head, call))),
                "alt": f"Entropy of {layer}, head {head}, between its floors and its maximum.",
                "caption": "The head in most trouble, or else the lowest. A floor near its maximum "
                "rules a collapse out; one near zero permits it, no more. Floors that rest on norms are "
                "not read in every measured step; their lines join those in which they are.",
            }
        )
    return shown


def map_image(rows: Any) -> str | None:
    """An alert's attention map as a data URI, None where there is none that can be drawn."""
    from entropy_monitor import figures

    if rows is None:
        return None
    try:
        ax = figures.attention_map(rows)
    except (TypeError, ValueError):
        return None  # a map that is no matrix is left out: the rest of the alert is worth showing
    ax.set_title("")
    ax.set_title("", loc="left")
    return _image(_figure(ax), pixels=True)


def _worst_head(run: RunTables, summed: Digest) -> tuple[str, int, int] | None:
    """The head that the first of the worst alerts names, else the head of the lowest share."""
    heads = run.heads
    for alert in alert_rows(run):
        evidence = alert["evidence"] or {}
        head, call = evidence.get("worst_head"), evidence.get("call", 0)
        here = heads["layer"] == alert["layer"]
        if head is not None and (here & (heads["head"] == head) & (heads["call"] == call)).any():
            return str(alert["layer"]), int(head), int(call)
    lowest = summed.lowest_share
    return None if lowest is None else (lowest.layer, lowest.head, lowest.call)


def _image(figure: Figure, *, pixels: bool = False) -> str:
    """A figure as a data URI: SVG, or PNG where that is asked for or smaller by far.

    SVG goes into an `img` rather than into the page, so that its ids cannot clash with another
    figure's.
    """
    if not pixels:
        svg = BytesIO()
        figure.savefig(svg, format="svg", facecolor="white", dpi=120, metadata={"Date": None})
        if len(svg.getvalue()) <= _SVG_LIMIT:
            return _data_uri("image/svg+xml", svg)
    png = BytesIO()
    figure.savefig(png, format="png", facecolor="white", dpi=130, metadata={"Software": None})
    return _data_uri("image/png", png)


def _data_uri(kind: str, buffer: BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _figure(ax: Axes) -> Figure:
    return cast("Figure", ax.figure)

"""The charts of TensorBoard's Custom Scalars tab: which tags stand together."""

from __future__ import annotations

import re
from collections.abc import Iterable

from entropy_monitor.trackers.aggregates import PREFIX

GROUP = 16
"""Layers in one foldable category: TensorBoard draws only what is unfolded."""

Layout = dict[str, dict[str, tuple[str, list[str]]]]
"""Category to chart to (`Margin` or `Multiline`, tags); a tag of `Multiline` is a regex."""

_FLOORS = ("floor_row", "floor_activation", "floor_weights")
_ACROSS = {
    "largest logit": "max_logit",
    "spectral norm of W_K W_Q": "sigma_qk_max",
    "largest gradient": "grad_linf",
    "spectral norm of the update": "update_sigma",
}


def layout(tags: Iterable[str], alerted: Iterable[str] = ()) -> Layout:
    """Charts for the calls that stand under `tags`, such as `attention/layer_03`, in that order.

    The whole model first, then layers with an alert; then, in groups of `GROUP` calls, the mean entropy
    between its least and largest head (margin charts) and the least entropy beside what it may fall to
    (floors) and rise to (its maximum).

    Args:
        tags: of every call that has scalars.
        alerted: those of them whose layer has had an alert.
    """
    calls, marked = list(tags), list(alerted)
    charts: Layout = {
        "Whole model": {
            "entropy, mean and least head": (
                "Multiline",
                [_exactly(f"{PREFIX}/all/{name}") for name in ("entropy_mean", "entropy_min")],
            ),
            "open alerts": ("Multiline", [_exactly(f"{PREFIX}/open_alerts")]),
        },
        "What drives entropy, all layers": {
            title: ("Multiline", [rf"^{PREFIX}/layer_\d+(/call_\d+)?/{metric}$"])
            for title, metric in _ACROSS.items()
        },
    }
    if marked:
        charts["Layers with an alert, entropy: mean, least and largest head"] = _margins(marked)
    for start in range(0, len(calls), GROUP):
        group = calls[start : start + GROUP]
        span = _name(group[0]) if len(group) == 1 else f"{_name(group[0])} to {_name(group[-1])}"
        charts[f"Entropy: mean, least and largest head, {span}"] = _margins(group)
        charts[f"Entropy and its floors, {span}"] = {
            _name(tag): (
                "Multiline",
                [_exactly(f"{tag}/{m}") for m in ("entropy_min", *_FLOORS, "max_entropy")],
            )
            for tag in group
        }
    return charts


def _margins(tags: list[str]) -> dict[str, tuple[str, list[str]]]:
    """The last first: TensorBoard shows the margin charts of a category from its end, and others not."""
    return {
        _name(tag): ("Margin", [f"{tag}/entropy_{part}" for part in ("mean", "min", "max")])
        for tag in reversed(tags)
    }


def _name(tag: str) -> str:
    return tag.removeprefix(f"{PREFIX}/").replace("/", " ")


def _exactly(tag: str) -> str:
    return f"^{re.escape(tag)}$"

"""What a run came to so far, in a few figures and a word, for the summary of a tracker."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entropy_monitor.records import SEVERITIES, Alert, Columns, Record, Severity
from entropy_monitor.trackers.aggregates import FloatArray, entropy_share, numbers

Value = str | int | float

_EXTREMES = ("lowest_share", "largest_logit", "sigma_growth")
_KEPT = {"broken_loss_step", *_EXTREMES, *(f"{name}_at" for name in _EXTREMES)}
_PLACE = ("layer_index", "call", "head")


class RunSummary:
    """Takes in the records of one run and says what it came to.

    `verdict` is `trouble` after a severe alert or a loss that was not finite, `watch` after a warning,
    `sound` without either, `unknown` where nothing was measured. Growth counts from the first record that
    is taken in.

    Args:
        earlier: what earlier processes of the run came to, by name as `values` gives it; extremes are kept.
    """

    def __init__(self, earlier: Mapping[str, Any] | None = None) -> None:
        self._figures: dict[str, Value] = {
            name: value for name, value in (earlier or {}).items() if name in _KEPT
        }
        self._first_sigma: FloatArray = np.empty(0)
        self._places: tuple[FloatArray, ...] = ()

    def take(self, record: Record) -> None:
        """Takes a record in."""
        names, values = record.scalars["name"], record.scalars["value"]
        for step, name, value in zip(record.scalars["step"], names, values, strict=True):
            if name == "loss" and not math.isfinite(value):
                self._figures.setdefault("broken_loss_step", int(step))
        heads = record.heads
        if not len(heads["head"]):
            return
        self._figures["last_step"] = record.step
        share = entropy_share(heads)
        finite = np.isfinite(share)
        if finite.any():
            self._figures["end_share"] = float(share[finite].mean())
            self._keep("lowest_share", heads, np.where(finite, -share, np.nan), sign=-1)
        self._keep("largest_logit", heads, numbers(heads, "max_logit"))
        self._keep("sigma_growth", heads, self._growth(heads))

    def values(self, alerts: Sequence[Alert]) -> dict[str, Value]:
        """The summary: name to figure or word.

        Args:
            alerts: of the run so far, in their latest states, in order of opening.
        """
        counts = Counter(alert.severity for alert in alerts)
        found: dict[str, Value] = {"verdict": self._verdict(counts)}
        found |= {f"alerts_{severity}": counts[severity] for severity in SEVERITIES}
        found["open_alerts"] = sum(alert.closed is None for alert in alerts)
        if alerts:
            found["first_alert_step"] = alerts[0].opened
            found["first_alert"] = alerts[0].title
        return found | self._figures

    def _verdict(self, counts: Mapping[Severity, int]) -> str:
        if counts["severe"] or "broken_loss_step" in self._figures:
            return "trouble"
        if counts["warning"]:
            return "watch"
        return "sound" if "last_step" in self._figures else "unknown"

    def _keep(self, name: str, heads: Columns, values: FloatArray, sign: int = 1) -> None:
        """Keeps the largest finite one of `values`, times `sign`, if there was no larger one before."""
        finite = np.isfinite(values)
        if not finite.any():
            return
        row = int(np.argmax(np.where(finite, values, -np.inf)))
        value, before = sign * float(values[row]), self._figures.get(name)
        if isinstance(before, (int, float)) and sign * before >= sign * value:
            return
        call = int(heads["call"][row])
        where = f"{heads['layer'][row]}, head {heads['head'][row]}" + (f", call {call}" if call else "")
        self._figures[name] = value
        self._figures[f"{name}_at"] = f"{where}, step {heads['step'][row]}"

    def _growth(self, heads: Columns) -> FloatArray:
        """σ_QK of each head over its own first; NaN where it is not known now or was not before."""
        sigma = numbers(heads, "sigma_qk")
        known = np.where(np.isfinite(sigma) & (sigma > 0), sigma, np.nan)
        places = tuple(numbers(heads, name) for name in _PLACE)
        same = len(places) == len(self._places) and all(map(np.array_equal, places, self._places))
        first = self._first_sigma if same else np.full(len(known), np.nan)
        self._first_sigma, self._places = np.where(np.isnan(first), known, first), places
        return known / self._first_sigma

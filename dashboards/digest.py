"""A run in a few numbers and words: what a reader wants to know before looking at any figure.

Pure functions of a run's tables. Nothing is drawn, and nothing is judged anew: whether a run is
sound follows from its alerts and from its loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from entropy_monitor.frames import SHARE, RunTables, finite, scalar, with_share
from entropy_monitor.phrases import percent as plain_percent
from entropy_monitor.records import SEVERITIES, severity_rank

Verdict = Literal["sound", "watch", "trouble", "unknown"]

_LAST_LOSSES = 10
"""Values whose mean is the final loss: one batch alone is noise."""


@dataclass(frozen=True)
class Reading:
    """One value of one head, and where it was measured."""

    value: float
    layer: str
    head: int
    call: int
    step: int

    @property
    def where(self) -> str:
        """The place in words."""
        call = f", call {self.call}" if self.call else ""
        return f"{self.layer}, head {self.head}{call}, step {self.step}"


@dataclass(frozen=True)
class Digest:
    """What a run came to.

    Attributes:
        name: the run's name.
        verdict: `trouble` after a severe alert or a loss that was not finite, `watch` after a
            warning, `sound` without either, `unknown` where nothing was measured.
        words: the verdict in a sentence or two.
        last_step: the last step of any table, None for an empty run.
        measured: how many steps were measured.
        final_loss: mean of the last ten losses that are finite.
        broken_loss: first step whose loss was not finite.
        end_share: mean over heads of entropy / max_entropy at the last measured step.
        lowest_share: smallest entropy / max_entropy of the whole run.
        sigma_growth: largest σ_QK of a head over that of its own first measurement.
        largest_logit: the largest logit.
        alerts: how many, by severity.
        open_alerts: how many were not closed at the end.
    """

    name: str
    verdict: Verdict
    words: str
    last_step: int | None
    measured: int
    final_loss: float | None
    broken_loss: int | None
    end_share: float | None
    lowest_share: Reading | None
    sigma_growth: Reading | None
    largest_logit: Reading | None
    alerts: Mapping[str, int]
    open_alerts: int


@dataclass(frozen=True)
class Event:
    """An alert as a line of the run's history."""

    run: str
    severity: str
    opened: int
    closed: int | None
    title: str


@dataclass(frozen=True)
class Advice:
    """One piece of advice, and what it was given for, worst first."""

    text: str
    reasons: tuple[str, ...]


def digest(run: RunTables) -> Digest:
    """Sums up one run. Empty tables and values that are not finite are no error."""
    heads, alerts, loss = with_share(run.heads), run.alerts, scalar(run)
    counts: dict[str, int] = {
        severity: int((alerts["severity"] == severity).sum()) if len(alerts) else 0 for severity in SEVERITIES
    }
    broken = loss.index[finite(loss).isna()]
    settled = finite(loss).dropna()
    steps = [int(table["step"].max()) for table in (heads, run.scalars) if len(table)]
    verdict: Verdict = "sound"
    if counts["severe"] or len(broken):
        verdict = "trouble"
    elif counts["warning"]:
        verdict = "watch"
    elif heads.empty:
        verdict = "unknown"
    at_end = heads.loc[heads["step"] == heads["step"].max(), SHARE]
    summed = Digest(
        name=run.name,
        verdict=verdict,
        words="",
        last_step=max(steps) if steps else None,
        measured=int(heads["step"].nunique()),
        final_loss=float(settled.iloc[-_LAST_LOSSES:].mean()) if len(settled) else None,
        broken_loss=int(broken[0]) if len(broken) else None,
        end_share=float(at_end.mean()) if at_end.notna().any() else None,
        lowest_share=_extreme(heads, heads[SHARE], largest=False),
        sigma_growth=_extreme(heads, _growth(heads), largest=True),
        largest_logit=_extreme(heads, finite(heads["max_logit"]), largest=True),
        alerts=counts,
        open_alerts=int(alerts["closed"].isna().sum()) if len(alerts) else 0,
    )
    return replace(summed, words=_words(summed, history([run])))


def alert_rows(run: RunTables) -> list[dict[str, Any]]:
    """The alerts as dicts, the worst first, then in order of opening; `closed` is an int or None."""
    rows = [{str(key): value for key, value in row.items()} for row in run.alerts.to_dict("records")]
    for row in rows:
        row["closed"] = None if pd.isna(row["closed"]) else int(row["closed"])
    return sorted(rows, key=lambda row: (-severity_rank(row["severity"]), row["opened"]))


def history(runs: Sequence[RunTables]) -> list[Event]:
    """The alerts of all runs in the order in which they opened."""
    events = [
        Event(run.name, str(row["severity"]), int(row["opened"]), row["closed"], str(row["title"]))
        for run in runs
        for row in alert_rows(run)
    ]
    return sorted(events, key=lambda event: (event.opened, -severity_rank(event.severity)))


def advice(runs: Sequence[RunTables]) -> list[Advice]:
    """What to change, that of severe alerts first.

    Texts of one run that differ in their numbers only are one piece of advice: the first one's, whose step is
    the safest to go back to.
    """
    rows = [(run.name, row) for run in runs for row in alert_rows(run)]
    texts: dict[tuple[str, str], str] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, row in sorted(rows, key=lambda pair: -severity_rank(pair[1]["severity"])):
        text = str(row["advice"]).strip()
        pattern = re.sub(r"\d+", "#", text)
        key = (name if pattern != text else "", pattern)
        texts.setdefault(key, text)
        reasons.setdefault(key, []).append(f"{name}: {row['title']}")
    return [Advice(text, tuple(dict.fromkeys(reasons[k]))) for k, text in texts.items() if text]


def headline(digests: Sequence[Digest]) -> str:
    """All runs in one sentence."""
    sound = sum(digest.verdict == "sound" for digest in digests)
    if len(digests) == 1:
        return digests[0].words
    if sound == len(digests):
        return f"All {sound} runs are sound: no warning and no severe alert."
    others = [
        (f"{what}: " + ", ".join(d.name for d in digests if d.verdict == verdict))
        for verdict, what in (
            ("trouble", "In trouble"),
            ("watch", "Worth a look"),
            ("unknown", "Nothing measured"),
        )
        if any(d.verdict == verdict for d in digests)
    ]
    number = "None" if not sound else str(sound)
    verb = "is" if sound == 1 else "are"
    return f"{number} of {len(digests)} runs {verb} sound. " + "; ".join(others) + "."


def _words(summed: Digest, events: Sequence[Event]) -> str:
    if summed.verdict == "unknown":
        return "Nothing was measured, so nothing can be said about this run."
    sentences = []
    if summed.verdict == "sound":
        sentences.append(f"Sound: no warning and no severe alert in {summed.measured} measured steps.")
    elif events:
        worst = next(s for s in reversed(SEVERITIES) if summed.alerts[s])
        first = next(event for event in events if event.severity == worst)
        start = "In trouble" if summed.verdict == "trouble" else "Worth a look"
        still = f"{summed.open_alerts} still open" if summed.open_alerts else "all closed since"
        count = f"{len(events)} alert{'s' * (len(events) != 1)}"
        sentences.append(f"{start} since step {first.opened}: {first.title.rstrip('.')}.")
        sentences.append(f"{count}, {still}.")
    if summed.broken_loss is not None:
        sentences.append(f"The loss was not finite at step {summed.broken_loss}.")
    if summed.end_share is not None and summed.lowest_share is not None:
        low = summed.lowest_share
        sentences.append(
            f"Attention entropy ended at {percent(summed.end_share)} of its maximum on average; "
            f"the lowest reading was {percent(low.value)} ({low.where})."
        )
    return " ".join(sentences)


def percent(share: float) -> str:
    """A share as `phrases.percent` gives it, with spaces that do not break."""
    return plain_percent(share).replace(" ", "\N{NO-BREAK SPACE}")


def _growth(heads: pd.DataFrame) -> pd.Series:
    sigma = finite(heads["sigma_qk"])
    ordered = heads[["layer", "call", "head", "step"]].assign(sigma=sigma.where(sigma > 0))
    ordered = ordered.sort_values("step", kind="stable")
    # "first" takes the first value that is known.
    start = ordered.groupby(["layer", "call", "head"], observed=True)["sigma"].transform("first")
    return (ordered["sigma"] / start).reindex(heads.index)


def _extreme(heads: pd.DataFrame, values: pd.Series, *, largest: bool) -> Reading | None:
    array = values.to_numpy(dtype="float64")
    if not np.isfinite(array).any():
        return None
    place = int(np.nanargmax(array) if largest else np.nanargmin(array))
    row = heads.iloc[place]
    return Reading(
        float(array[place]), str(row["layer"]), int(row["head"]), int(row["call"]), int(row["step"])
    )

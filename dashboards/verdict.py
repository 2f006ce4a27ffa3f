"""A run in a few numbers and words: what a reader wants to know before looking at any figure.

Nothing is drawn, and nothing is judged anew: whether a run is sound follows from its alerts and its loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from entropy_monitor.dashboards.reductions import extreme
from entropy_monitor.phrases import percent as plain_percent
from entropy_monitor.records import SEVERITIES, SHARE, Alert, severity_rank

if TYPE_CHECKING:
    from entropy_monitor.store import Cubes, FollowedRun

Verdict = Literal["sound", "watch", "trouble", "unknown"]

WORST_FIRST: tuple[Verdict, ...] = ("trouble", "watch", "unknown", "sound")
"""Every verdict, the worst first."""

_LAST_LOSSES = 10
"""Values whose mean is the final loss: one batch alone is noise."""


@dataclass(frozen=True)
class Reading:
    """One value of one head, and where it was measured; `row` is its place in the run's heads."""

    value: float
    layer: str
    head: int
    call: int
    step: int
    row: int

    @property
    def where(self) -> str:
        """The place in words."""
        call = f", call {self.call}" if self.call else ""
        return f"{self.layer}, head {self.head}{call}, step {self.step:,}"


@dataclass(frozen=True)
class Digest:
    """What a run came to.

    Attributes:
        name: the run's name.
        verdict: `trouble` after a severe alert or a loss that was not finite, `watch` after a
            warning, `sound` without either, `unknown` where nothing was measured.
        headline: the verdict in a sentence.
        words: the same, and what else there is to say in a few sentences.
        first_step: the first step that was measured, None for an empty run.
        last_step: the last step of any table, None for an empty run.
        measured: how many steps were measured.
        final_loss: mean of the last ten losses; None where one of them is not finite.
        broken_loss: first step whose loss was not finite.
        end_share: mean over heads of entropy / max_entropy at the last measured step.
        lowest_share: smallest entropy / max_entropy of the whole run.
        sigma_growth: largest σ_QK of a head over that of its own first measurement; of a run in blocks,
            over the mean of the first one.
        largest_logit: the largest logit.
        alerts: how many, by severity.
        open_alerts: how many were not closed at the end.
        damaged: how many pieces of the run are damaged or missing, and were not read.
    """

    name: str
    verdict: Verdict
    headline: str
    words: str
    first_step: int | None
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
    damaged: int


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


def digest(name: str, run: FollowedRun, alerts: Sequence[Alert]) -> Digest:
    """Sums up one run. Empty tables and values that are not finite are no error.

    Args:
        name: what the run is called.
        run: its tables.
        alerts: in their last states.
    """
    heads = run.heads
    heads.columns((SHARE, "sigma_qk", "max_logit"), "high")  # at once is quicker
    counts: dict[str, int] = {s: sum(alert.severity == s for alert in alerts) for s in SEVERITIES}
    loss_steps, losses = run.scalars.get("loss", (np.empty(0, np.int64), np.empty(0)))
    broken, settled = loss_steps[~np.isfinite(losses)], losses[-_LAST_LOSSES:]
    last = [int(steps[-1]) for steps, _ in run.scalars.values()]
    last += [cubes.last for cubes in (heads, run.layers) if cubes.last is not None]
    verdict: Verdict = "sound"
    if counts["severe"] or len(broken):
        verdict = "trouble"
    elif counts["warning"]:
        verdict = "watch"
    elif not len(heads.steps):
        verdict = "unknown"
    elif run.damage:
        verdict = "watch"
    summed = Digest(
        name=name,
        verdict=verdict,
        headline="",
        words="",
        first_step=int(heads.steps[0]) if len(heads.steps) else None,
        last_step=max(last, default=None),
        measured=heads.measured,
        final_loss=float(settled.mean()) if len(settled) and np.isfinite(settled).all() else None,
        broken_loss=int(broken[0]) if len(broken) else None,
        end_share=_mean_at_end(heads),
        lowest_share=_extreme(heads, heads.column(SHARE, "low"), largest=False),
        sigma_growth=_extreme(heads, _growth(heads), largest=True),
        largest_logit=_extreme(heads, heads.column("max_logit", "high"), largest=True),
        alerts=counts,
        open_alerts=sum(alert.closed is None for alert in alerts),
        damaged=len(run.damage),
    )
    sentences = _sentences(summed, history([(name, alerts)]))
    return replace(summed, headline=sentences[0], words=" ".join(sentences))


def gravest(alerts: Sequence[Alert]) -> Alert | None:
    """The first of the most severe alerts; None where there is none that is more than a remark."""
    serious = [alert for alert in alerts if severity_rank(alert.severity) > severity_rank("info")]
    return min(serious, key=lambda alert: (-severity_rank(alert.severity), alert.opened), default=None)


def history(runs: Iterable[tuple[str, Sequence[Alert]]]) -> list[Event]:
    """The alerts of all runs, each with its name, in the order in which they opened."""
    events = [
        Event(name, alert.severity, alert.opened, alert.closed, alert.title)
        for name, alerts in runs
        for alert in alerts
    ]
    return sorted(events, key=lambda event: (event.opened, -severity_rank(event.severity)))


def advice(runs: Iterable[tuple[str, Sequence[Alert]]]) -> list[Advice]:
    """What to change, that of severe alerts first.

    Texts of one run that differ in their numbers only are one piece of advice: the first one's, whose step is
    the safest to go back to.
    """
    given = [(name, alert) for name, alerts in runs for alert in sorted(alerts, key=lambda a: a.opened)]
    texts: dict[tuple[str, str], str] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, alert in sorted(given, key=lambda pair: -severity_rank(pair[1].severity)):
        text = alert.advice.strip()
        pattern = re.sub(r"\d+", "#", text)
        key = (name if pattern != text else "", pattern)
        texts.setdefault(key, text)
        reasons.setdefault(key, []).append(f"{name}: {alert.title}")
    return [Advice(text, tuple(dict.fromkeys(reasons[k]))) for k, text in texts.items() if text]


def headline(digests: Sequence[Digest]) -> str:
    """All runs in one sentence."""
    sound = sum(digest.verdict == "sound" for digest in digests)
    if len(digests) == 1:
        return digests[0].headline
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


def _sentences(summed: Digest, events: Sequence[Event]) -> list[str]:
    if summed.verdict == "unknown":
        lost = " Pieces of it could not be read." if summed.damaged else ""
        return [f"Nothing was measured, so nothing can be said about this run.{lost}"]
    sentences = []
    if summed.verdict == "sound":
        sentences.append(f"Sound: no warning and no severe alert in {summed.measured:,} measured steps.")
    elif summed.alerts["severe"] or summed.alerts["warning"]:
        worst = "severe" if summed.alerts["severe"] else "warning"
        first = next(event for event in events if event.severity == worst)
        start = "In trouble" if summed.verdict == "trouble" else "Worth a look"
        still = f"{summed.open_alerts} still open" if summed.open_alerts else "all closed since"
        count = f"{len(events)} alert{'s' * (len(events) != 1)}"
        sentences.append(f"{start} since step {first.opened:,}: {first.title.rstrip('.')}.")
        sentences.append(f"{count}, {still}.")
    elif summed.broken_loss is None:
        sentences.append("Worth a look: no warning and no severe alert in what could be read.")
    if summed.damaged:
        pieces = "A piece" if summed.damaged == 1 else f"{summed.damaged:,} pieces"
        sentences.append(f"{pieces} of this run could not be read.")
    if summed.broken_loss is not None:
        sentences.append(f"The loss was not finite at step {summed.broken_loss:,}.")
    if summed.end_share is not None and summed.lowest_share is not None:
        low = summed.lowest_share
        sentences.append(
            f"Attention entropy ended at {percent(summed.end_share)} of its maximum on average; "
            f"the lowest reading was {percent(low.value)} ({low.where})."
        )
    return sentences


def percent(share: float) -> str:
    """A share as `phrases.percent` gives it, with spaces that do not break."""
    return plain_percent(share).replace(" ", "\N{NO-BREAK SPACE}")


def _mean_at_end(heads: Cubes) -> float | None:
    shares = heads.column(SHARE)[-1:]
    known = shares[np.isfinite(shares)]
    return float(known.mean(dtype=np.float64)) if known.size else None


def _growth(heads: Cubes) -> npt.NDArray[np.float32]:
    """`[steps, rows]`: σ_QK over that of the head's first measurement."""
    sigma, start = heads.column("sigma_qk", "high"), heads.column("sigma_qk")
    if not len(sigma):
        return sigma
    usable = np.isfinite(start) & (start > 0)
    first = np.argmax(usable, axis=0)
    rows = np.arange(start.shape[1])
    base = np.where(usable[first, rows], start[first, rows], np.nan).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        grown: npt.NDArray[np.float32] = sigma / base
    return grown


def _extreme(heads: Cubes, values: npt.NDArray[np.float32], *, largest: bool) -> Reading | None:
    """The largest or least finite value, the first one of equal ones."""
    best = extreme(values, "high" if largest else "low")
    if np.isnan(best):
        return None
    step, row = divmod(int((values == np.float32(best)).argmax()), values.shape[1])
    at = heads.places[row]
    return Reading(best, at.layer, at.head, at.call, int(heads.steps[step]), row)

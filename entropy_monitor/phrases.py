"""Figures in words, the same in alerts, reports and dashboards."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float) -> str:
    """A figure to three significant digits, without an exponent where that reads well."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    """A share in percent, with a digit more where it is small: "82 %", "0.4 %", "< 0.1 %"."""
    value = 100 * share
    if value == 0:
        return "0 %"
    if 0 < value < 0.1:
        return "< 0.1 %"
    return f"{value:.1f} %" if abs(value) < 9.95 else f"{value:.0f} %"


def times(ratio: float) -> str:
    """A ratio: "12.4×", "310×"."""
    return f"{ratio:.1f}×" if ratio < 100 else f"{ratio:,.0f}×"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers: "3", "0 and 1", "0–6, 9 and 11"; empty for none."""
    runs: list[str] = []
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            run = numbers[start:i]
            runs += [f"{run[0]}–{run[-1]}"] if len(run) > 2 else [str(each) for each in run]
            start = i
    return " and ".join(part for part in (", ".join(runs[:-1]), *runs[-1:]) if part)


def heads(which: Sequence[int], of: int) -> str:
    """Some heads of a layer: "heads 0, 1 and 3 of 4", "all 12 heads", "heads 0–6 and 9 of 12"."""
    if len(which) == of and of > 1:
        return f"all {of} heads"
    return f"head{'s' if len(which) > 1 else ''} {ranges(which)} of {of}"

"""Verdicts on projections: what values said about them, looked at once for each."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from entropy_monitor.hooks.agreement import agree

_SAMPLE = 64  # rows of a tensor that are looked at


class NoProjectionError(Exception):
    """There is no projection to be told; the message says why, "{}" standing for queries or keys."""


@dataclass(frozen=True)
class _Verdict:
    """What values said.

    Attributes:
        agree: None where there were too few numbers.
        tokens: how many were looked at.
    """

    agree: bool | None
    tokens: int


class Verdicts:
    """What was found out about projections by looking at values, once for each.

    Args:
        settled: where it is kept, from forward to forward.
    """

    def __init__(self, settled: dict[Hashable, Any]) -> None:
        self._settled = settled

    def require(
        self, question: Hashable, seen: Tensor, made: Tensor | None, tolerance: float, no: str
    ) -> None:
        """Ask whether `[B, H, T, D]` agree, if that was not asked before.

        Raises:
            NoProjectionError: with `no`, if they do not.
        """
        verdict: _Verdict | None = self._settled.get(question)
        if made is not None and not seen.is_meta:
            tokens = seen.shape[0] * seen.shape[2]
            if verdict is None or (verdict.agree is None and tokens > verdict.tokens):
                verdict = self._settled[question] = _Verdict(agree(seen, made, tolerance), tokens)
        if verdict is not None and verdict.agree is False:
            raise NoProjectionError(no)

    def require_same(self, question: Hashable, a: Tensor, b: Tensor, tolerance: float, no: str) -> None:
        """Ask whether rows of two tensors are the same, if that was not asked before; raises likewise."""
        if question not in self._settled:
            same = a.shape == b.shape
            if same:
                rows = slice(None, None, max(1, a.shape[:-1].numel() // _SAMPLE))
                x, y = (t.detach().flatten(0, -2)[rows].float() for t in (a, b))
                same = bool((x - y).norm() <= tolerance * x.norm())
            self._settled[question] = same
        if not self._settled[question]:
            raise NoProjectionError(no)

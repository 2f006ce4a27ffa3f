"""What a detector is, and what it hands over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import BoolArray, State
from entropy_monitor.analyzer.thresholds import Thresholds
from entropy_monitor.records import Severity


@dataclass(frozen=True)
class Finding:
    """What is wrong with one layer at the moment.

    Attributes:
        layer: qualified name, empty for the whole run.
        heads: the query heads concerned, ascending.
        of: how many heads the layer has.
        severity: how bad it is.
        since: step of the first sign.
        score: how far it has gone, in doublings: one more is worth telling.
        worst: slot of the worst head, None where no head is to blame.
        figures: what only this detector knows, for the alert's evidence.
    """

    layer: str
    heads: tuple[int, ...]
    of: int
    severity: Severity
    since: int
    score: float
    worst: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Words:
    """What a person reads of an alert."""

    title: str
    message: str
    advice: str


class Detector(Protocol):
    """Finds one kind of trouble, record by record, in constant memory per head."""

    kind: ClassVar[str]

    def __init__(self, thresholds: Thresholds) -> None: ...

    def update(self, reading: Reading) -> list[Finding]:
        """Take in a record; all that is wrong now, at most one finding a layer.

        A layer that this record did not measure keeps the finding that it had.
        """
        ...

    def near(self) -> BoolArray:
        """Per slot, whether it is, or may with the next record be, part of a finding about some heads.

        Shape [slots], or shorter where the last of them are not.
        """
        ...

    def describe(self, finding: Finding, evidence: Mapping[str, Any]) -> Words:
        """Say it in words; `evidence` lacks what is not known."""
        ...

    def state_dict(self) -> State:
        """All that is remembered, as plain JSON."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` gave."""
        ...

"""The analyzer: runs every detector over each record and keeps the alerts."""

from __future__ import annotations

from typing import Any

import numpy as np

from entropy_monitor.analyzer.detector import Finding
from entropy_monitor.analyzer.evidence import Evidence
from entropy_monitor.analyzer.lifecycle import AlertBook
from entropy_monitor.analyzer.loss import LossTrack
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.registry import DETECTORS
from entropy_monitor.analyzer.slots import HeadIndex, State
from entropy_monitor.analyzer.thresholds import Thresholds
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import Alert, AlertEvent, Record

_STATE_VERSION = 1
_DEFAULT = Thresholds()


class Analyzer:
    """Records in, alerts out; incremental, in constant memory per head.

    Args:
        thresholds: what counts as ill.

    Example:
        >>> analyzer = Analyzer()
        >>> for record in records:
        ...     for event in analyzer.update(record):
        ...         print(event.event, event.alert)
    """

    def __init__(self, thresholds: Thresholds = _DEFAULT) -> None:
        self.thresholds = thresholds
        self._index = HeadIndex()
        self._loss = LossTrack(thresholds.loss_smoothing)
        self._evidence = Evidence()
        self._detectors = tuple(detector(thresholds) for detector in DETECTORS)
        self._book = AlertBook()

    @property
    def open_alerts(self) -> tuple[Alert, ...]:
        """The alerts that are open, oldest first."""
        return self._book.open_alerts

    @property
    def suspects(self) -> frozenset[str]:
        """Layers with an alert, or with heads for which the next record may open one."""
        index, near = self._index, np.zeros(len(self._index), dtype=np.bool_)
        for detector in self._detectors:
            slots = detector.near()
            near[: len(slots)] |= slots
        return frozenset(index.layers[i] for i in set(index.layer[near].tolist()))

    def update(self, record: Record) -> list[AlertEvent]:
        """Take in one measured step.

        Args:
            record: its heads, layers and scalars; heads may differ from record to record.

        Returns:
            The alerts that opened, changed or closed with it. The evidence of an alert about a
            layer holds `worst_head` and `call`: where to look up an attention map for `attach`.
        """
        self._loss.update(record)
        reading = Reading.of(record, self._index, self._loss, self.thresholds.min_max_entropy)
        self._evidence.remember(reading)

        def gather(finding: Finding) -> dict[str, Any]:
            return {**self._evidence.gather(reading, finding.worst), **finding.figures}

        events: list[AlertEvent] = []
        for detector in self._detectors:
            findings = detector.update(reading)
            events += self._book.update(detector.kind, findings, record.step, gather, detector.describe)
        return events

    def attach(self, alert_id: str, **evidence: Any) -> Alert:
        """Store more evidence with an open alert, such as `map`, and keep it for its later events.

        It is dropped when an update names another worst head: it would describe the wrong one.

        Args:
            alert_id: the alert's id.
            evidence: what to add, plain JSON or arrays.

        Returns:
            The alert with that evidence.

        Raises:
            ConfigurationError: no such alert is open.
        """
        return self._book.attach(alert_id, evidence)

    def state_dict(self) -> State:
        """All that is remembered, as strict JSON; an analyzer that loads it goes on as if never stopped."""
        return {
            "version": _STATE_VERSION,
            "index": self._index.state_dict(),
            "loss": self._loss.state_dict(),
            "evidence": self._evidence.state_dict(),
            "alerts": self._book.state_dict(),
            "detectors": {d.kind: d.state_dict() for d in self._detectors},
        }

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` gave. Detectors that it does not know start afresh.

        Raises:
            ConfigurationError: the state was written in another layout.
        """
        if state.get("version") != _STATE_VERSION:
            raise ConfigurationError(
                f"this analyzer state has version {state.get('version')!r}, this package reads "
                f"{_STATE_VERSION}: start the analyzer afresh, or use the version that wrote it"
            )
        self._index.load_state_dict(state["index"])
        self._loss.load_state_dict(state["loss"])
        self._evidence.load_state_dict(state["evidence"])
        self._book.load_state_dict(state["alerts"])
        for detector in self._detectors:
            if detector.kind in state["detectors"]:
                detector.load_state_dict(state["detectors"][detector.kind])

"""From the figures of a step to the analyzer and the sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from entropy_monitor.alerting import Alerting
from entropy_monitor.delivery import Delivery
from entropy_monitor.guard import Guard
from entropy_monitor.hooks import Harvest
from entropy_monitor.records import AlertEvent, Record
from entropy_monitor.scalars import Number, ScalarLog
from entropy_monitor.transfer import Transfer, pack

_SCALARS_HELD = 4_096  # until they are sent without a measured step


class Pipeline:
    """Scalars and figures in; records, analysed and delivered, out as soon as the device has copied them.

    Args:
        alerting: judges every record.
        delivery: takes records and alerts to the sinks.
        guard: keeps faults from the training.
        observe: told of every record with figures, and of what it was made from.
    """

    def __init__(
        self,
        alerting: Alerting,
        delivery: Delivery,
        guard: Guard,
        observe: Callable[[Harvest, Record], object] | None = None,
    ) -> None:
        self._alerting = alerting
        self._delivery = delivery
        self._guard = guard
        self._observe = observe
        self._scalars = ScalarLog()
        self._transfer = Transfer()
        self._events: list[AlertEvent] = []

    def keep(self, step: int, loss: Number | None, scalars: Mapping[str, Number] | None) -> None:
        """Keep a step's scalars until figures take them along, or until they are many."""
        self._guard.run("keeping scalars", self._scalars.add, step, loss, scalars)
        self._guard.run("sending scalars", self._send_scalars, _SCALARS_HELD)

    def send(self, step: int, harvest: Harvest, updates: Tensor) -> None:
        """Start a measured step's figures on their way, and with them all scalars that were kept."""
        self._transfer.send(pack(step, self._scalars.take(), harvest, updates))

    def receive(self) -> None:
        """Analyse and pass on what has arrived from the device."""
        self._guard.run("receiving figures", self._receive, False)

    def take_events(self) -> tuple[AlertEvent, ...]:
        """Changes of alerts since the last time."""
        events, self._events = tuple(self._events), []
        return events

    def close(self, timeout: float) -> None:
        """Deliver what is left, and close the sinks."""
        self._guard.run("sending scalars", self._send_scalars, 1)
        self._guard.run("receiving figures", self._receive, True)
        self._guard.run("closing the sinks", self._delivery.close, timeout)

    def state_dict(self) -> dict[str, Any]:
        """What was analysed, and the scalars that no record has taken yet; JSON-able. Waits for the device.

        A part that fails is left out: a checkpoint must not fail for it.
        """
        self._guard.run("receiving figures", self._receive, True)
        return {
            "scalars": self._guard.run("saving scalars", self._scalars.state_dict),
            "analyzer": self._guard.run("saving the analyzer", self._alerting.state_dict),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if state["analyzer"] is not None:
            self._alerting.load_state_dict(state["analyzer"])
        self._scalars.load_state_dict(state["scalars"] or [])

    def _send_scalars(self, least: int) -> None:
        if len(self._scalars) >= least:
            batch = self._scalars.take()
            self._transfer.send(pack(batch.rows[-1][0], batch))

    def _receive(self, wait: bool) -> None:
        for harvest, record in self._transfer.receive(wait):
            try:
                events = self._alerting.judge(record, harvest)
                if harvest is not None and self._observe is not None:
                    self._guard.run("planning", self._observe, harvest, record)
            finally:
                # Not before: the sinks' threads would take turns with this one at every numpy function.
                self._guard.run("delivering", self._delivery.send, record)
            self._events += events
            for event in events:
                self._guard.run("delivering", self._delivery.send, event)
            for event in events:
                self._alerting.tell(event)

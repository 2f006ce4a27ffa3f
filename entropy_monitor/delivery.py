"""Carries records and alerts to the sinks, on threads of its own, so that no sink can hold up training."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from entropy_monitor.guard import Guard
from entropy_monitor.records import AlertEvent, Record, Sink

logger = logging.getLogger("entropy_monitor")

_IDLE_SECONDS = 1.0


class Courier:
    """One sink behind a bounded queue and a thread.

    Args:
        sink: already open.
        guard: takes what the sink raises; a sink that raises is switched off.
        capacity: records and alerts that may wait; what comes on top is dropped and counted.

    Attributes:
        dropped: how many records and alerts were dropped.
    """

    def __init__(self, sink: Sink, guard: Guard, capacity: int) -> None:
        self.sink = sink
        self.dropped = 0
        self._guard = guard
        self._part = f"{type(sink).__name__} ({id(sink):x})"
        self._queue: queue.Queue[Record | AlertEvent | None] = queue.Queue(capacity)
        self._closing = False
        self._thread = threading.Thread(
            target=self._work, name=f"entropy-monitor {type(sink).__name__}", daemon=True
        )
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many records and alerts have not reached the sink yet."""
        return self._queue.qsize()

    def send(self, item: Record | AlertEvent) -> None:
        """Hand over, or drop where the queue is full; never waits."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning(
                    "entropy-monitor: %s cannot keep up; what it cannot take is dropped",
                    type(self.sink).__name__,
                )

    def finish(self, deadline: float) -> bool:
        """Deliver what waits and close the sink; False if that was not done by `deadline` (monotonic seconds)."""
        self._closing = True
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=0.05 if self._closing else _IDLE_SECONDS)
            except queue.Empty:
                if self._closing:
                    break
                self._run(self.sink.flush)
                continue
            if isinstance(item, Record):
                self._run(self.sink.log, item)
            elif item is not None:
                self._run(self.sink.alert, item)
        self._guard.run(f"closing {self._part}", self.sink.close)

    def _run(self, call: Callable[..., None], *args: Record | AlertEvent) -> None:
        self._guard.run(self._part, call, *args)


class Delivery:
    """All sinks of a monitor.

    Args:
        sinks: already open.
        capacity: per sink, see `Courier`.
    """

    def __init__(self, sinks: Sequence[Sink], capacity: int = 4096) -> None:
        self._guard = Guard(patience=1)
        self._couriers = [Courier(sink, self._guard, capacity) for sink in sinks]

    @property
    def dropped(self) -> dict[str, int]:
        """How much each sink missed because it could not keep up."""
        return {type(c.sink).__name__: c.dropped for c in self._couriers if c.dropped}

    @property
    def faults(self) -> dict[str, int]:
        """How often each sink raised."""
        return dict(self._guard.faults)

    def send(self, item: Record | AlertEvent) -> None:
        """Hand a record or an alert's change to every sink; never waits."""
        for courier in self._couriers:
            courier.send(item)

    def close(self, seconds: float) -> None:
        """Deliver what waits and close the sinks, for at most so many seconds altogether."""
        deadline = time.monotonic() + seconds
        for courier in self._couriers:
            if not courier.finish(deadline):
                logger.warning(
                    "entropy-monitor: %s did not finish within %g s; %d records or alerts did not reach it",
                    type(courier.sink).__name__,
                    seconds,
                    courier.waiting,
                )
        self._couriers = [c for c in self._couriers if c.dropped]

"""Carries records and alerts to the sinks, on threads of its own, so that no sink can hold up training."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from entropy_monitor.guard import Guard
from entropy_monitor.records import AlertEvent, Record, RunInfo, Sink

logger = logging.getLogger("entropy_monitor")

_IDLE_SECONDS = 1.0

Call = Callable[[], None]


def open_sinks(info: RunInfo, sinks: Sequence[Sink]) -> None:
    """Open every sink; if one cannot work, close those before it and let its error through."""
    opened: list[Sink] = []
    try:
        for sink in sinks:
            sink.open(info)
            opened.append(sink)
    except BaseException:
        guard = Guard()  # the first error is the one to tell
        for sink in opened:
            guard.run(f"closing {type(sink).__name__}", sink.close)
        raise


class Courier:
    """One sink behind a bounded queue and a thread.

    Args:
        sink: already open.
        name: of the sink, in logs and counts.
        guard: takes what the sink raises; a sink that raises is switched off.
        capacity: calls that may wait; what comes on top is dropped and counted.

    Attributes:
        dropped: how many calls were dropped.
    """

    def __init__(self, sink: Sink, name: str, guard: Guard, capacity: int) -> None:
        self.sink = sink
        self.name = name
        self.dropped = 0
        self._guard = guard
        self._capacity = capacity
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._abandoned = False
        self._thread = threading.Thread(target=self._work, name=f"entropy-monitor {name}", daemon=True)
        self._thread.start()

    def send(self, call: Call) -> None:
        """Have the sink's thread make a call, or drop it where too many wait; never waits."""
        if self._queue.qsize() < self._capacity:
            self._queue.put(call)
            return
        self.dropped += 1
        if self.dropped == 1:
            logger.warning(
                "entropy-monitor: %s cannot keep up: %d records and alerts wait, more are dropped",
                self.name,
                self._capacity,
            )

    def finish(self) -> None:
        """Take no more calls; close the sink after those that wait."""
        self._queue.put(None)

    def join(self, deadline: float) -> bool:
        """Wait for the sink to be closed; give up what still waits at `deadline` (monotonic seconds).

        Returns:
            Whether everything was delivered.
        """
        if self._thread is not threading.current_thread():  # garbage collection may run anywhere
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if not self._thread.is_alive():
            return True
        self._abandoned = True
        self.dropped += max(0, self._queue.qsize() - 1)  # the last one is the end, not a call
        return False

    def _work(self) -> None:
        unflushed = False
        while not self._abandoned:
            try:
                call = self._queue.get(timeout=_IDLE_SECONDS if unflushed else None)
            except queue.Empty:
                call, unflushed = self.sink.flush, False
            else:
                unflushed = True
            if call is None:
                break
            self._guard.run(self.name, call)
        self._guard.run(f"closing {self.name}", self.sink.close)


class Delivery:
    """All sinks of a monitor.

    Args:
        sinks: already open, each with the number of records and alerts that may wait for it.
    """

    def __init__(self, sinks: Sequence[tuple[Sink, int]]) -> None:
        self._guard = Guard(patience=1)
        kinds: Counter[str] = Counter()
        self._couriers: list[Courier] = []
        for sink, capacity in sinks:
            kind = type(sink).__name__
            kinds[kind] += 1
            name = kind if kinds[kind] == 1 else f"{kind} {kinds[kind]}"
            self._couriers.append(Courier(sink, name, self._guard, capacity))

    @property
    def dropped(self) -> dict[str, int]:
        """How many records and alerts each sink missed because it could not keep up."""
        return {c.name: c.dropped for c in self._couriers if c.dropped}

    @property
    def faults(self) -> dict[str, int]:
        """How often each sink raised."""
        return dict(self._guard.faults)

    def send(self, item: Record | AlertEvent) -> None:
        """Hand a record or an alert's change to every sink; never waits."""
        for courier in self._couriers:
            sink = courier.sink
            courier.send(partial(sink.log, item) if isinstance(item, Record) else partial(sink.alert, item))

    def call(self, sink: Sink, call: Call) -> None:
        """Have one sink's thread make a call of another kind; never waits."""
        for courier in self._couriers:
            if courier.sink is sink:
                courier.send(call)

    def close(self, seconds: float) -> None:
        """Deliver what waits and close the sinks, for at most so many seconds altogether."""
        deadline = time.monotonic() + seconds
        for courier in self._couriers:
            courier.finish()
        for courier in self._couriers:
            before = courier.dropped
            if not courier.join(deadline):
                logger.warning(
                    "entropy-monitor: %s did not finish within %g s; %d records and alerts did not reach it",
                    courier.name,
                    seconds,
                    courier.dropped - before,
                )

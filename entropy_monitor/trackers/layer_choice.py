"""Which layers have metrics of their own, so that hundreds of layers do not drown a tracker."""

from __future__ import annotations

import numpy as np

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.trackers.aggregates import LayerAggregate

MAX_LAYERS = 48
"""Layers with metrics of their own, by default: some 900 metrics at most, and as many again under alert."""

Key = tuple[int, int]


class LayerChoice:
    """Chooses attention calls of a run: evenly spaced ones, and those of layers with an alert.

    A model of at most `most` calls is shown whole. Of more, `most` are chosen when the first record comes,
    from the first to the last; a choice that was made stays, so that no curve breaks off. A layer that an
    alert names joins them from the next record on, and at most `most` calls do so.

    Args:
        most: calls with metrics of their own; 0: none.

    Raises:
        ConfigurationError: `most` is negative or no whole number.
    """

    def __init__(self, most: int) -> None:
        if not isinstance(most, int) or isinstance(most, bool) or most < 0:
            raise ConfigurationError(
                f"max_layers is {most!r}; give a whole number, 0 for metrics of the whole model alone"
            )
        self._most = most
        self._seen: set[Key] = set()
        self._spaced: set[Key] = set()
        self._alerted: set[Key] = set()
        self._named: set[str] = set()

    def alert(self, layer: str) -> None:
        """Notes that an alert names this layer."""
        self._named.add(layer)

    def choose(self, layers: list[LayerAggregate]) -> list[LayerAggregate]:
        """Those of a record's calls that are shown, in their order."""
        keys = [(layer.index, layer.call) for layer in layers]
        new = [key for key in keys if key not in self._seen]
        if new:
            self._space(new)
            self._seen.update(new)
        if len(self._spaced) < len(self._seen) and self._named:
            self._join(layers)
        return [
            layer
            for key, layer in zip(keys, layers, strict=True)
            if key in self._spaced or key in self._alerted
        ]

    @property
    def with_alert(self) -> frozenset[str]:
        """Layers that an alert has named."""
        return frozenset(self._named)

    def _space(self, new: list[Key]) -> None:
        room = self._most - len(self._spaced)
        if len(new) > room:
            places = np.linspace(0, len(new) - 1, max(room, 0)).round().astype(int)
            new = [new[place] for place in places]
        self._spaced.update(new)

    def _join(self, layers: list[LayerAggregate]) -> None:
        for layer in layers:
            key = layer.index, layer.call
            if len(self._alerted) >= self._most:
                return
            if layer.layer in self._named and key not in self._spaced:
                self._alerted.add(key)

"""From the layers' metrics of a run's records, in turn, to those of the whole model."""

from __future__ import annotations

import numpy as np

from entropy_monitor.trackers.aggregates import PREFIX, LayerAggregate, Reduction

OVERALL_METRICS: dict[str, Reduction] = {
    "entropy_mean": "mean",
    "entropy_min": "min",
    "max_logit": "max",
    "sigma_qk_max": "max",
}
"""Metrics of the whole model: how those of all layers and calls are reduced to one."""

_OF_ALL_OR_NONE = "sigma_qk_max"
"""Weights are read in some records, and between them those of layers under suspicion alone: a maximum over
these would jump with what is read, and not with the weights."""

SURE_AFTER = 4
"""Records of which one had the weights of every layer read that can be."""

_GIVEN_UP = 3 * SURE_AFTER
"""Records after which weights that are not read any more (adapters that were merged) are not waited for."""


class WholeModel:
    """What the records of one run have shown of its layers, and the metrics of the whole model.

    The largest σ_QK is given in records in which it is known of every layer's call that is there and for
    which it has been known of late, and left out in others. Since a process may begin anywhere in a run, a
    layer that has not been known yet is waited for in its first few records too.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], int] = {}  # and in which record last
        self._records = 0

    def reduce(self, layers: list[LayerAggregate]) -> dict[str, float]:
        """Takes a record in and reduces its layers' metrics; the mean weighs each head alike."""
        overall: dict[str, float] = {}
        whole = self._takes_in(layers)
        for metric, how in OVERALL_METRICS.items():
            known = [(a.values[metric], a.heads) for a in layers if metric in a.values]
            if not known or (metric == _OF_ALL_OR_NONE and not whole):
                continue
            numbers, weights = (np.array(x, dtype=np.float64) for x in zip(*known, strict=True))
            if how == "mean":
                overall[metric] = float(np.average(numbers, weights=weights))
            else:
                overall[metric] = float(numbers.min() if how == "min" else numbers.max())
        return overall

    def metrics(
        self, layers: list[LayerAggregate], shown: list[LayerAggregate] | None = None
    ) -> dict[str, float]:
        """A record's metrics under the names that trackers show, such as `attention/all/entropy_min`.

        Args:
            layers: every call of the record, all of which enter `attention/all/…`.
            shown: those with metrics of their own; all of them by default.
        """
        named = {f"{PREFIX}/all/{name}": value for name, value in self.reduce(layers).items()}
        for layer in layers if shown is None else shown:
            tag = layer.tag
            for name, value in layer.values.items():
                named[f"{tag}/{name}"] = value
        return named

    def _takes_in(self, layers: list[LayerAggregate]) -> bool:
        """Remembers which calls are known, and says whether all are that can be expected to."""
        calls = {(a.layer, a.call): _OF_ALL_OR_NONE in a.values for a in layers if a.heads}
        unknown = {call for call, known in calls.items() if not known}
        self._records += bool(calls)
        self._known |= dict.fromkeys(calls.keys() - unknown, self._records)
        if self._records < SURE_AFTER:
            return not unknown
        return not any(self._records - self._known.get(call, -_GIVEN_UP) < _GIVEN_UP for call in unknown)

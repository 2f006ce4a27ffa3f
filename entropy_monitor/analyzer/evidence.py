"""The figures that go with an alert: the worst head's readings, and how far they are from the run's start."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import SlotArrays, State

_HEAD_FIGURES = (
    "entropy",
    "entropy_se",
    "max_entropy",
    "max_logit",
    "floor_row",
    "floor_activation",
    "floor_weights",
    "sigma_q",
    "sigma_k",
    "sigma_qk",
)
_LAYER_FIGURES = ("grad_linf", "grad_l2", "update_sigma", "update_entropy")
_FROM_START = ("share", "max_logit", "sigma_qk")


class Evidence:
    """Remembers each head's first readings, and gathers figures when an alert needs them."""

    def __init__(self) -> None:
        self._first = SlotArrays(step=math.nan, **dict.fromkeys(_FROM_START, math.nan))
        self._gradients: dict[str, float] = {}

    def remember(self, reading: Reading) -> None:
        """Keep the first finite value of each figure of each head."""
        self._first.grow(len(reading.index))
        columns = {
            "share": reading.share,
            "max_logit": reading.max_logit,
            "sigma_qk": reading.column("sigma_qk"),
        }
        for name, values in columns.items():
            first = self._first[name]
            new = np.isnan(first) & np.isfinite(values)
            if new.any():
                first[new] = values[new]
                if name == "share":
                    self._first["step"][new] = reading.step
        unknown = [layer for layer in reading.record.layers.get("layer", ()) if layer not in self._gradients]
        if unknown and np.isfinite(reading.layer_figures("grad_linf")).any():
            for layer in unknown:
                gradient = reading.layer_figure(layer, "grad_linf")
                if math.isfinite(gradient):
                    self._gradients[layer] = gradient

    def gather(self, reading: Reading, slot: int | None) -> dict[str, Any]:
        """All that is known of one head and its layer, and of the loss. What is not known is absent.

        Args:
            reading: the record at hand.
            slot: the head's slot, None for what concerns the whole run.

        Returns:
            `worst_head`, `call` and the figures; `*_at_start` is the head's first reading in this
            run, `*_growth` the ratio to it.
        """
        figures = {"loss": reading.loss.last, "loss_at_start": reading.loss.start}
        who: dict[str, Any] = {}
        if slot is not None:
            who = {
                "worst_head": int(reading.index.head[slot]),
                "call": int(reading.index.call[slot]),
            }
            figures |= self._head_figures(reading, slot)
        return who | {name: value for name, value in figures.items() if math.isfinite(value)}

    def state_dict(self) -> State:
        """The first readings."""
        return {"heads": self._first.state_dict(), "gradients": dict(self._gradients)}

    def load_state_dict(self, state: State) -> None:
        """Take over what `state_dict` gave."""
        self._first.load_state_dict(state["heads"])
        self._gradients = dict(state["gradients"])

    def _head_figures(self, reading: Reading, slot: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        if reading.seen[slot]:
            figures = {name: float(reading.column(name)[slot]) for name in _HEAD_FIGURES}
            figures["entropy_share"] = float(reading.share[slot])
        for name in _FROM_START:
            figures[f"{name}_at_start"] = float(self._first[name][slot])
        figures["start_step"] = float(self._first["step"][slot])
        figures["sigma_qk_growth"] = _ratio(figures, "sigma_qk")
        figures["max_logit_growth"] = _ratio(figures, "max_logit")
        layer = reading.index.layers[reading.index.layer[slot]]
        figures |= {name: reading.layer_figure(layer, name) for name in _LAYER_FIGURES}
        figures["grad_linf_at_start"] = self._gradients.get(layer, math.nan)
        figures["grad_linf_growth"] = _ratio(figures, "grad_linf")
        return figures


def _ratio(figures: dict[str, float], name: str) -> float:
    """Present value / first value, NaN unless the first was above 0."""
    start = figures[f"{name}_at_start"]
    return figures.get(name, math.nan) / start if start > 0 else math.nan

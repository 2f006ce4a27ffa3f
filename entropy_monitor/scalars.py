"""The loss and the user's own scalars, left on their device until the next copy."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import SCALARS, Array, Columns

logger = logging.getLogger("entropy_monitor")

Number = float | int | np.number[Any] | Array | Tensor


@dataclass(frozen=True)
class ScalarBatch:
    """Scalars in the order in which they were given.

    Attributes:
        rows: step and name of each.
        values: a number, or a tensor of one element that is still on an accelerator.
    """

    rows: tuple[tuple[int, str], ...] = ()
    values: tuple[float | Tensor, ...] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """The values that are still on an accelerator, in order."""
        return [v for v in self.values if isinstance(v, Tensor)]

    def columns(self, fetched: Sequence[float]) -> Columns:
        """The rows of `scalars`.

        Args:
            fetched: what `tensors` hold.
        """
        if not self.rows:
            return SCALARS.empty()
        rest = iter(fetched)
        values = [next(rest) if isinstance(v, Tensor) else v for v in self.values]
        return {
            "step": np.array([step for step, _ in self.rows], dtype=np.int64),
            "name": [name for _, name in self.rows],
            "value": np.array(values, dtype=np.float64),
        }


class ScalarLog:
    """Scalars since they were last taken."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, str]] = []
        self._values: list[float | Tensor] = []
        self._refused: set[object] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, loss: Number | None, scalars: Mapping[str, Number] | None) -> None:
        """Keep a step's scalars, the loss first; their graphs are not kept, and no device is waited for.

        One that is no number is left out, and the user told once for each name.
        """
        for name, value in _named(loss, scalars if isinstance(scalars, Mapping) else None).items():
            try:
                check_scalars(None, {name: value})
            except ConfigurationError as error:
                if name not in self._refused:
                    self._refused.add(name)
                    logger.warning("entropy-monitor: at step %d a scalar is left out: %s", step, error)
                continue
            self._values.append(_kept(value))
            self._rows.append((step, name))

    def take(self) -> ScalarBatch:
        """All that were added; empties the log."""
        batch = ScalarBatch(tuple(self._rows), tuple(self._values))
        self._rows, self._values = [], []
        return batch

    def state_dict(self) -> list[list[Any]]:
        """Step, name and value of each, JSON-able; waits for accelerators."""
        values = [float(v) for v in self._values]
        return [[step, name, repr(v)] for (step, name), v in zip(self._rows, values, strict=True)]

    def load_state_dict(self, state: Iterable[Sequence[Any]]) -> None:
        """Take over what `state_dict` gave."""
        entries = list(state)
        self._rows = [(int(step), str(name)) for step, name, _ in entries]
        self._values = [float(value) for *_, value in entries]


def check_scalars(loss: object, scalars: object) -> None:
    """Raise unless the loss and the scalars are single real numbers.

    Raises:
        ConfigurationError: one is not; its text names it.
    """
    if scalars is not None and not isinstance(scalars, Mapping):
        raise ConfigurationError(f"scalars must be a dict from name to number, got {type(scalars).__name__}")
    if loss is not None and scalars and "loss" in scalars:
        raise ConfigurationError("scalars holds 'loss', which is given as the loss too: rename or drop one")
    for name, value in _named(loss, scalars).items():
        if not isinstance(name, str):
            raise ConfigurationError(f"names in scalars must be texts, got {name!r}")
        if isinstance(value, (Tensor, np.ndarray)):
            size = value.numel() if isinstance(value, Tensor) else value.size
            if size != 1:
                raise ConfigurationError(
                    f"{name} must be a single number, got shape {list(value.shape)}: pass its mean"
                )
            if value.dtype.kind in "cOSU" if isinstance(value, np.ndarray) else value.is_complex():
                raise ConfigurationError(f"{name} must be a real number, got dtype {value.dtype}")
        elif not isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
            raise ConfigurationError(f"{name} must be a number, got {type(value).__name__}")


def _named(loss: Any, scalars: Mapping[Any, Any] | None) -> dict[Any, Any]:
    return {**({} if loss is None else {"loss": loss}), **(scalars or {})}


def _kept(value: Number) -> float | Tensor:
    if isinstance(value, Tensor) and value.device.type != "cpu":
        # A copy: the user may change the tensor in place before it is read.
        return value.detach().reshape(()).clone()
    return float(value.item()) if isinstance(value, (Tensor, np.ndarray)) else float(value)


def stacked(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Single-element tensors as one, `[len(tensors)]`."""
    if not tensors:
        return torch.empty(0, device=device, dtype=dtype)
    if len({(t.device, t.dtype) for t in tensors}) == 1:  # as they mostly are: two operations for all
        return torch.stack(list(tensors)).to(device, dtype, non_blocking=True)
    return torch.stack([t.to(device, dtype, non_blocking=True) for t in tensors])

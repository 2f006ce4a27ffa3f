"""The loss and the user's own scalars, left on their device until the next copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import Array, Columns

ScalarRow = tuple[int, str]
Number = float | int | Tensor


class ScalarLog:
    """Scalars since the last measured step."""

    def __init__(self) -> None:
        self._rows: list[ScalarRow] = []
        self._values: list[Number] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, step: int, loss: Number | None, scalars: Mapping[str, Number] | None) -> None:
        """Keep a step's scalars; tensors are copied on their device, so that reuse of their memory is harmless."""
        named = {} if loss is None else {"loss": loss}
        for name, value in {**named, **(scalars or {})}.items():
            self._rows.append((step, name))
            self._values.append(value.detach().clone() if isinstance(value, Tensor) else float(value))

    def take(self, device: torch.device) -> tuple[tuple[ScalarRow, ...], Tensor]:
        """All rows, and their values as one tensor on `device`; empties the log."""
        rows, values = tuple(self._rows), self._values
        self._rows, self._values = [], []
        dtype = torch.float32 if device.type == "mps" else torch.float64
        tensors = [v.to(device, dtype).reshape(()) for v in values if isinstance(v, Tensor)]
        numbers = torch.tensor([v for v in values if not isinstance(v, Tensor)], dtype=dtype)
        if not tensors:
            return rows, numbers.to(device, non_blocking=True)
        on_device = torch.stack(tensors)
        if not len(numbers):
            return rows, on_device
        # Tensors first, then numbers: one copy of each kind, whatever the order in which they came.
        is_tensor = [isinstance(v, Tensor) for v in values]
        order = sorted(range(len(values)), key=lambda i: not is_tensor[i])
        joined = torch.cat([on_device, numbers.to(device, non_blocking=True)])
        return tuple(rows[i] for i in order), joined


def scalar_columns(rows: Sequence[ScalarRow], values: Array) -> Columns:
    """The rows of `scalars`."""
    return {
        "step": np.array([step for step, _ in rows], dtype=np.int64),
        "name": [name for _, name in rows],
        "value": values.astype(np.float64),
    }


def check_scalars(loss: object, scalars: object) -> None:
    """Raise unless the loss and the scalars are single numbers."""
    named: dict[str, object] = {} if loss is None else {"loss": loss}
    if scalars is not None:
        if not isinstance(scalars, Mapping):
            raise ConfigurationError(
                f"scalars must be a dict from name to number, got {type(scalars).__name__}"
            )
        named.update(scalars)
    for name, value in named.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ConfigurationError(
                    f"{name} must be a single number, got a tensor of shape {list(value.shape)}: pass its mean"
                )
        elif not isinstance(value, (int, float, np.number)):
            raise ConfigurationError(f"{name} must be a number, got {type(value).__name__}")

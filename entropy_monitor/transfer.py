"""Figures on their way from the device to the host: one copy a measured step, and no wait."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_monitor.hooks import Harvest
from entropy_monitor.recording import head_columns, layer_columns
from entropy_monitor.records import SCALARS, Array, Record
from entropy_monitor.scalars import ScalarLog, ScalarRow, scalar_columns


@dataclass(frozen=True)
class Parcel:
    """One measured step's figures, copied or being copied.

    Attributes:
        harvest: what the figures belong to.
        scalars: all scalars since the last parcel.
        tensors: shapes of the parts of `flat`.
        flat: all figures in one host tensor.
        event: recorded after the copy; None where the copy was made at once.
    """

    harvest: Harvest
    scalars: tuple[ScalarRow, ...]
    shapes: tuple[torch.Size, ...]
    flat: Tensor
    event: torch.cuda.Event | None

    @property
    def arrived(self) -> bool:
        """Whether the figures can be read without waiting."""
        return self.event is None or self.event.query()

    def open(self) -> Record:
        """The record. Waits for the copy if it has not arrived."""
        if self.event is not None:
            self.event.synchronize()
        heads, sigmas, updates, scalars = self._parts()
        harvest = self.harvest
        layers = torch.cat([torch.from_numpy(sigmas), torch.from_numpy(updates)], dim=1).numpy()
        return Record(
            harvest.step,
            head_columns(harvest, heads),
            layer_columns(harvest, layers),
            scalar_columns(self.scalars, scalars) if self.scalars else SCALARS.empty(),
        )

    def _parts(self) -> list[Array]:
        sizes = [shape.numel() for shape in self.shapes]
        parts = self.flat.split(sizes)
        return [p.reshape(s).numpy() for p, s in zip(parts, self.shapes, strict=True)]


def pack(harvest: Harvest, updates: Tensor, log: ScalarLog) -> Parcel:
    """Start the copy of one step's figures.

    Args:
        harvest: figures of heads and layers.
        updates: `[layers, 4]`, of gradients and updates.
        log: scalars since the last parcel; emptied.
    """
    device = harvest.figures.device
    rows, values = log.take(device)
    tensors = [harvest.figures, harvest.sigmas, updates, values]
    shapes = tuple(t.shape for t in tensors)
    # float64 keeps scalars as they were given; MPS has none.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    flat = torch.cat([t.to(device, dtype).flatten() for t in tensors])
    if device.type != "cuda":
        return Parcel(harvest, rows, shapes, flat.cpu(), None)
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    host.copy_(flat, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return Parcel(harvest, rows, shapes, host, event)


class Transfer:
    """Parcels in the order in which they were sent."""

    def __init__(self) -> None:
        self._parcels: deque[Parcel] = deque()

    def send(self, parcel: Parcel) -> None:
        """Take a parcel."""
        self._parcels.append(parcel)

    def receive(self, wait: bool = False) -> list[tuple[Harvest, Record]]:
        """What has arrived, oldest first; everything, if `wait`."""
        arrived = []
        while self._parcels and (wait or self._parcels[0].arrived):
            parcel = self._parcels.popleft()
            arrived.append((parcel.harvest, parcel.open()))
        return arrived

"""Figures on their way from the device to the host: one copy a measured step, and no wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from entropy_monitor.hooks import Harvest
from entropy_monitor.recording import head_columns, layer_columns
from entropy_monitor.records import HEADS, Array, Record
from entropy_monitor.scalars import ScalarBatch, stacked


class Arrival(Protocol):
    """What tells when a copy is done: `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether it is done."""

    def synchronize(self) -> None:
        """Wait until it is done."""


@dataclass(frozen=True)
class Parcel:
    """Figures and scalars, copied or being copied.

    Attributes:
        step: the training step that ended.
        harvest: what the figures belong to; None where there are only scalars.
        scalars: all scalars since the last parcel.
        shapes: of the parts of `flat`.
        flat: all that was on the device, in one host tensor.
        arrival: of the copy; None where it was made at once.
    """

    step: int
    harvest: Harvest | None
    scalars: ScalarBatch
    shapes: tuple[torch.Size, ...]
    flat: Tensor
    arrival: Arrival | None

    @property
    def arrived(self) -> bool:
        """Whether the figures can be read without waiting."""
        return self.arrival is None or self.arrival.query()

    def open(self) -> Record:
        """The record. Waits for the copy if it has not arrived."""
        if self.arrival is not None:
            self.arrival.synchronize()
        *figures, fetched = self._parts()
        scalars = self.scalars.columns(fetched.tolist())
        if self.harvest is None:
            return Record(self.step, HEADS.empty(), scalars=scalars)
        heads, sigmas, updates = figures
        layers = np.concatenate([sigmas, updates], axis=1)
        return Record(
            self.step, head_columns(self.harvest, heads), layer_columns(self.harvest, layers), scalars
        )

    def _parts(self) -> list[Array]:
        parts = torch.split(self.flat, [shape.numel() for shape in self.shapes])
        return [p.reshape(s).numpy() for p, s in zip(parts, self.shapes, strict=True)]


def pack(
    step: int, scalars: ScalarBatch, harvest: Harvest | None = None, updates: Tensor | None = None
) -> Parcel:
    """Start the copy of what is on the device.

    Args:
        step: the training step that ended.
        scalars: since the last parcel.
        harvest: figures of heads and layers, if the step was measured.
        updates: `[layers, 4]`, of gradients and updates; given with a harvest.
    """
    figures = [] if harvest is None or updates is None else [harvest.figures, harvest.sigmas, updates]
    device = next((t.device for t in (*figures, *scalars.tensors)), torch.device("cpu"))
    # float64 keeps scalars as they were given; MPS has none.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    tensors = [*figures, stacked(scalars.tensors, device, dtype)]
    flat = torch.cat([t.to(device, dtype).flatten() for t in tensors])
    host, arrival = _to_host(flat)
    return Parcel(step, harvest, scalars, tuple(t.shape for t in tensors), host, arrival)


def fetch(tensor: Tensor) -> Tensor:
    """A tensor on the host, where a parcel that was packed after it has arrived.

    On CUDA it is copied on a stream of its own: its values are there, and what training has queued since is
    not waited for.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    with torch.cuda.stream(torch.cuda.Stream(tensor.device)):  # type: ignore[no-untyped-call]
        return tensor.cpu()


class Transfer:
    """Parcels in the order in which they were sent."""

    def __init__(self) -> None:
        self._parcels: deque[Parcel] = deque()

    def send(self, parcel: Parcel) -> None:
        """Take a parcel."""
        self._parcels.append(parcel)

    def receive(self, wait: bool = False) -> Iterator[tuple[Harvest | None, Record]]:
        """What has arrived, oldest first; everything, if `wait`."""
        while self._parcels and (wait or self._parcels[0].arrived):
            parcel = self._parcels.popleft()
            yield parcel.harvest, parcel.open()


def _to_host(flat: Tensor) -> tuple[Tensor, Arrival | None]:
    if flat.device.type != "cuda":
        return flat.cpu(), None
    host = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
    # It runs on the current stream of flat's device; the allocators keep both blocks until it is done.
    host.copy_(flat, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(flat.device))
    return host, event

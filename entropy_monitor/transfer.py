"""Figures on their way from the device to the host: one copy a measured step, and no wait."""

from __future__ import annotations

import math
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
        shapes: of the figures in `flat`: float32, after the scalars.
        flat: all that was on the device, in one host tensor, as int32: bits, whatever they stand for.
        wide: whether the scalars in `flat` are float64, and not float32.
        arrival: of the copy; None where it was made at once.
    """

    step: int
    harvest: Harvest | None
    scalars: ScalarBatch
    shapes: tuple[torch.Size, ...]
    flat: Tensor
    wide: bool
    arrival: Arrival | None

    @property
    def arrived(self) -> bool:
        """Whether the figures can be read without waiting."""
        return self.arrival is None or self.arrival.query()

    def open(self) -> Record:
        """The record. Waits for the copy if it has not arrived."""
        if self.arrival is not None:
            self.arrival.synchronize()
        fetched, figures = self._parts()
        scalars = self.scalars.columns(fetched.tolist())
        if self.harvest is None:
            return Record(self.step, HEADS.empty(), scalars=scalars)
        heads, *of_layers = figures
        return Record(
            self.step, head_columns(self.harvest, heads), layer_columns(self.harvest, *of_layers), scalars
        )

    def _parts(self) -> tuple[Array, list[Array]]:
        """Scalars and figures."""
        words = self.flat.numpy()
        start = len(words) - sum(math.prod(shape) for shape in self.shapes)
        scalars = words[:start].view(np.float64 if self.wide else np.float32)
        figures = []
        for shape in self.shapes:
            stop = start + math.prod(shape)
            figures.append(words[start:stop].view(np.float32).reshape(shape))
            start = stop
        return scalars, figures


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
    wide = device.type != "mps"
    # As bits everything goes into one copy as it is: nothing is converted on the device, or widened.
    words = [t.to(device, torch.float32).view(torch.int32).flatten() for t in figures]
    if scalars.tensors:
        dtype = torch.float64 if wide else torch.float32
        words.insert(0, stacked(scalars.tensors, device, dtype).view(torch.int32))
    host, arrival = _to_host(torch.cat(words) if words else torch.empty(0, dtype=torch.int32))
    return Parcel(step, harvest, scalars, tuple(t.shape for t in figures), host, wide, arrival)


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

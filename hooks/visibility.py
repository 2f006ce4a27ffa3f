"""Which keys a call's rows see, in words: no mask, causal, a window, padding.

A few rows of a few sequences are kept on the device; they are looked at when someone asks, for that waits
for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from entropy_monitor.hooks.calls import AttentionCall, Inputs
from entropy_monitor.measures import hidden, hidden_logits

Array = npt.NDArray[Any]

_SEQUENCES = 4
_ROWS = 64


@dataclass(frozen=True)
class Visibility:
    """A sample of what rows see.

    Attributes:
        form: how keys are hidden: `boolean`, `additive`, `in the kernel`, or empty.
        visible: `[b, r, S]`, boolean, of the first head.
        rows: which rows these are, `[r]`.
        tokens: how many rows there are, T.
        biased: whether anything is added to logits that are seen, one boolean; None where none could be.
    """

    form: str
    visible: Tensor
    rows: Tensor
    tokens: int
    biased: Tensor | None = None

    def in_words(self) -> str:
        """The kind of mask; waits for the device.

        In numpy: this may run on a thread of its own, and where a second thread of a process runs torch's
        parallel loops, OpenMP no longer keeps the training's own threads ready.
        """
        visible, rows = self.visible.cpu().numpy(), self.rows.cpu().numpy()
        kind = _kind(visible, rows, self.tokens)
        parts = [] if kind == "none" else [kind]
        if self.biased is not None and bool(self.biased):
            parts.append("bias")
        if not parts:
            return f"{self.form}, hides nothing" if self.form else "none"
        return (f"{self.form}: " if self.form else "") + " + ".join(parts)


@torch.no_grad()
def sample(call: AttentionCall) -> Visibility | None:
    """What some rows of a call's first head see; nothing here waits for the device.

    None for tensors that are spread over processes (DTensor): to index them is a collective.
    """
    i = call.inputs
    if any(hasattr(t, "device_mesh") for t in (call.rows, *(() if i is None else (i.k, i.mask)))):
        return None
    b, _, t = call.shape
    n = min(b, _SEQUENCES)
    count = min(t, _ROWS)
    device = call.rows.device
    # Evenly from the first to the last, without a copy from the host.
    rows = torch.arange(count, device=device) * max(t - 1, 0) // max(count - 1, 1)
    if call.logits is not None:
        seen = call.logits[:n, 0].index_select(1, rows)
        return Visibility("", ~hidden_logits(seen), rows, t)
    if call.inputs is None:
        raise ValueError(f"attention call of {call.layer}: neither inputs nor logits")
    return _of_inputs(call.inputs, n, rows, t)


def _of_inputs(inputs: Inputs, n: int, rows: Tensor, t: int) -> Visibility:
    s = inputs.k.shape[2]
    device = rows.device
    visible = torch.ones(n, rows.shape[0], s, dtype=torch.bool, device=device)
    if inputs.is_causal:
        visible &= torch.arange(s, device=device) <= rows[:, None]
    form, biased = "", None
    if inputs.mask is not None:
        mask = inputs.mask.detach()
        form = "boolean" if mask.dtype == torch.bool else "additive"
        part = mask.expand(inputs.q.shape[0], inputs.q.shape[1], t, s)[:n, 0].index_select(1, rows)
        unseen = hidden(part)
        visible &= ~unseen
        if mask.dtype != torch.bool:
            biased = ((part != 0) & ~unseen).any()
    if inputs.modify is not None:
        form = "in the kernel"
        nothing = torch.zeros(n, 1, rows.shape[0], s, device=device)
        logits, unseen_there = inputs.modify(nothing, slice(0, n), slice(0, 1), rows)
        if unseen_there is not None:
            visible &= ~unseen_there.expand_as(nothing)[:, 0]
        biased = ((logits != 0).expand_as(nothing)[:, 0] & visible).any()
    return Visibility(form, visible, rows, t, biased)


def _kind(visible: Array, rows: Array, tokens: int) -> str:
    """`none`, `causal`, `window of n`, … and whether sequences are padded."""
    found = [_pattern(sequence, rows, tokens) for sequence in visible]
    names = list(dict.fromkeys(name for name, _ in found))
    padded = any(columns for _, columns in found)
    known = [name for name in names if name != "pattern"]
    if not known:
        return "pattern"
    name = known[0] if len(names) == 1 else f"{known[0]} + per sequence"
    if not padded:
        return name
    return "padding" if name == "none" else f"{name} + padding"


def _pattern(visible: Array, rows: Array, tokens: int) -> tuple[str, bool]:
    """The kind of mask of one sequence `[r, S]`, and whether whole columns are hidden on top of it."""
    s = visible.shape[1]
    columns = visible.any(0)
    for shift in dict.fromkeys((0, s - tokens)):
        distance = np.arange(s) - rows[:, None] - shift
        for name, band in _bands(visible, distance):
            if np.array_equal(visible, band & columns):
                return name, bool((band & ~columns).any())
    return "pattern", False


def _bands(visible: Array, distance: Array) -> list[tuple[str, Array]]:
    """The masks by distance from the diagonal that it may be, the simplest first."""
    bands = [("none", np.ones_like(visible)), ("causal", distance <= 0)]
    if visible.any():
        seen = distance[visible]
        left, right = -int(seen.min()), int(seen.max())
        band = (distance >= -left) & (distance <= right)
        name = f"window of {left + 1}" if right == 0 else f"window -{left}…+{right}"
        bands.append((name, band))
    return bands

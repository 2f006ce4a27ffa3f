"""From what the hooks gathered on the device to the records that everything else reads."""

from __future__ import annotations

import functools

import numpy as np
import torch

from entropy_monitor.hooks import FIGURES, Harvest
from entropy_monitor.hooks.recorder import HeadIndex
from entropy_monitor.records import HEADS, LAYERS, Array, Columns

_LAYER_FIGURES = LAYERS.names[3:]
_ROWS_READ = FIGURES.index("rows_read")


def head_columns(harvest: Harvest, figures: Array) -> Columns:
    """The rows of `heads` of one step. Nothing is shared with the rows of another.

    Args:
        harvest: what the figures belong to.
        figures: `harvest.figures` on the host, `[len(FIGURES), Σ heads]`.
    """
    names, kinds, places = _head_places(harvest.index)
    layer_index, call, head = places.copy()
    figures = figures.astype(np.float32)  # a copy: page-locked memory is not to be held by records that wait
    columns: Columns = {
        "step": np.full(len(names), harvest.step, dtype=np.int64),
        "layer": names.copy(),
        "layer_index": layer_index,
        "call": call,
        "head": head,
        "attention": kinds.copy(),
        **dict(zip(FIGURES, figures, strict=True)),
    }
    columns["rows_read"] = figures[_ROWS_READ].astype(np.int64)
    return {name: columns[name] for name in HEADS.names}


def layer_columns(harvest: Harvest, *figures: Array) -> Columns:
    """The rows of `layers` of one step. Nothing is shared with the rows of another.

    Args:
        harvest: what the figures belong to.
        *figures: `[layers, 4]` each, on the host: spectral norms, then gradients and updates.
    """
    by_name = np.concatenate([part.T for part in figures], dtype=np.float32)
    return {
        "step": np.full(len(harvest.layers), harvest.step, dtype=np.int64),
        "layer": [name for name, _ in harvest.layers],
        "layer_index": np.array([index for _, index in harvest.layers], dtype=np.int64),
        **dict(zip(_LAYER_FIGURES, by_name, strict=True)),
    }


def to_host(tensor: torch.Tensor) -> Array:
    """A tensor's values; waits for its device."""
    return np.asarray(tensor.detach().cpu().numpy())


@functools.lru_cache(maxsize=8)  # a step measures what the one before it did, in every monitor that is open
def _head_places(index: tuple[HeadIndex, ...]) -> tuple[list[str], list[str], Array]:
    """Of every row: its layer, how attention is normalised, and `[3, rows]`: layer index, call, head."""
    heads = [i.heads for i in index]
    names = [i.layer for i in index for _ in range(i.heads)]
    kinds = [i.attention for i in index for _ in range(i.heads)]
    places = [[i.layer_index for i in index], [i.call for i in index], [i.first_head for i in index]]
    rows = np.repeat(np.array(places, dtype=np.int64), heads, axis=1)
    rows[2] += np.arange(sum(heads)) - np.repeat(np.cumsum(heads) - heads, heads)
    return names, kinds, rows

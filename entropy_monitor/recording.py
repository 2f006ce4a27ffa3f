"""From what the hooks gathered on the device to the records that everything else reads."""

from __future__ import annotations

import numpy as np
import torch

from entropy_monitor.hooks import FIGURES, Harvest
from entropy_monitor.records import HEADS, LAYERS, Array, Columns

_LAYER_FIGURES = LAYERS.names[3:]


def head_columns(harvest: Harvest, figures: Array) -> Columns:
    """The rows of `heads` of one step.

    Args:
        harvest: what the figures belong to.
        figures: `harvest.figures` on the host, `[len(FIGURES), Σ heads]`.
    """
    heads = [i.heads for i in harvest.index]
    columns: Columns = {
        "step": np.full(sum(heads), harvest.step, dtype=np.int64),
        "layer": [i.layer for i in harvest.index for _ in range(i.heads)],
        "layer_index": np.repeat(np.array([i.layer_index for i in harvest.index], dtype=np.int64), heads),
        "call": np.repeat(np.array([i.call for i in harvest.index], dtype=np.int64), heads),
        "head": np.concatenate([np.arange(i.heads, dtype=np.int64) + i.first_head for i in harvest.index]),
        "attention": [i.attention for i in harvest.index for _ in range(i.heads)],
    }
    for name, row in zip(FIGURES, figures, strict=True):
        columns[name] = row.astype(np.float32)
    columns["rows_read"] = figures[FIGURES.index("rows_read")].astype(np.int64)
    return {name: columns[name] for name in HEADS.names}


def layer_columns(harvest: Harvest, figures: Array) -> Columns:
    """The rows of `layers` of one step.

    Args:
        harvest: what the figures belong to.
        figures: `[layers, 8]` on the host: spectral norms, then gradients and updates.
    """
    columns: Columns = {
        "step": np.full(len(harvest.layers), harvest.step, dtype=np.int64),
        "layer": [name for name, _ in harvest.layers],
        "layer_index": np.array([index for _, index in harvest.layers], dtype=np.int64),
    }
    for name, row in zip(_LAYER_FIGURES, figures.T, strict=True):
        columns[name] = row.astype(np.float32)
    return columns


def to_host(tensor: torch.Tensor) -> Array:
    """A tensor's values; waits for its device."""
    return np.asarray(tensor.detach().cpu().numpy())

"""Row statistics of one attention call, by the cheapest means that its form and its device allow."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from entropy_monitor import measures
from entropy_monitor.hooks.calls import AttentionCall, Inputs, fused_factors
from entropy_monitor.hooks.explain import bias_norm, steepest
from entropy_monitor.measures import RowStatistics
from entropy_monitor.measures.fused_entropy import fused_available, fused_row_entropy, supports_fused
from entropy_monitor.measures.triton_rows import supports_triton, triton_available, triton_row_statistics

_TRITON = "ENTROPY_MONITOR_TRITON"


class Reading(NamedTuple):
    """What was read of a call.

    Attributes:
        stats: of the rows read, `[B, H, R]` each.
        scale: factor of q·k, broadcastable to `[B, H, R]`; None where it is not known.
        how: which rows were read, and by what, in words.
    """

    stats: RowStatistics
    scale: Tensor | None
    how: str


def read(call: AttentionCall, rows: Tensor | None) -> Reading:
    """Read rows of a call, `[R]` indices; None for all.

    On the CPU logits are made in blocks that stay in its caches: all rows cost 1.2 to 1.7 times what one
    fused forward does (`benchmarks/rows.py`), and give every figure. On an accelerator a block would go
    through its memory again and again; there all rows are read by one fused call with V := K where that is
    valid, which gives entropies and row floors but no largest logit, or by a Triton kernel, which gives
    everything. That has been checked without a GPU only, so it has to be asked for:
    `ENTROPY_MONITOR_TRITON=1`.

    Raises:
        ValueError: if the call has neither logits nor all that makes them.
    """
    which = "all rows" if rows is None else f"{rows.shape[0]} of {call.shape[2]} rows"
    i = call.inputs
    if call.weights is not None and call.logits is not None:
        return Reading(
            measures.row_statistics_from_weights(call.weights, call.logits, rows=rows),
            None,
            f"{which}, of the model's own weights",
        )
    if call.logits is not None:
        stats = measures.row_statistics_from_logits(call.logits, rows=rows)
        how = f"{which}, of the model's own logits"
        if i is None or i.scale is None:
            return Reading(stats, None, how)
        stats = stats._replace(bias_norm=bias_norm(i, call.logits, rows))
    elif i is not None and isinstance(i.scale, float):
        stats, by = _recomputed(i, rows)
        how = f"{which}, {by}"
    else:
        raise ValueError(f"attention call of {call.layer}: neither logits nor all that makes them")
    scale = steepest(i)
    if scale is None:
        return Reading(stats, None, how)
    if isinstance(scale, Tensor):
        return Reading(stats, scale.detach() if scale.dim() == 0 else scale.detach().squeeze(-1), how)
    # Filled on the device: a copy from the host would wait for it.
    return Reading(stats, torch.full((), scale, device=stats.entropy.device), how)


def _recomputed(i: Inputs, rows: Tensor | None) -> tuple[RowStatistics, str]:
    factor, softcap = fused_factors(i)
    options: dict[str, Any] = {"mask": i.mask, "is_causal": i.is_causal}
    if rows is None and i.q.device.type != "cpu":
        parts = (i.q, i.k, i.mask, i.is_causal, softcap, i.modify)
        if os.environ.get(_TRITON) == "1" and triton_available(i.q.device) and supports_triton(*parts):
            stats = triton_row_statistics(i.q, i.k, **options, scale=factor, softcap=softcap)
            return stats, "by a Triton kernel"
        if fused_available(i.q.device) and supports_fused(*parts):
            return fused_row_entropy(i.q, i.k, **options, scale=factor), "by one fused call"
    stats = measures.row_statistics(
        i.q, i.k, **options, scale=factor, softcap=softcap, rows=rows, modify=i.modify
    )
    return stats, "in blocks"

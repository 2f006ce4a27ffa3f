"""An alert as pages show it: its evidence as labelled figures, its heads as rows of the map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entropy_monitor.phrases import number, percent, times

_LABELS = {
    "entropy": "entropy (nats)",
    "entropy_se": "standard error of the entropy (nats)",
    "max_entropy": "maximal entropy (nats)",
    "entropy_share": "entropy / maximum",
    "share_at_start": "entropy / maximum at the start",
    "opened_share": "entropy / maximum when it opened",
    "start_step": "step of the first reading",
    "below_floor": "nats below a floor",
    "max_logit": "largest logit",
    "max_logit_at_start": "largest logit at the start",
    "max_logit_growth": "largest logit / its first value",
    "max_logit_layer": "largest logit of the layer",
    "floor_row": "floor from each row's logits (nats)",
    "floor_activation": "floor from the norms of q and k (nats)",
    "floor_weights": "floor from weights and inputs (nats)",
    "sigma_q": "σ(W_Q)",
    "sigma_k": "σ(W_K)",
    "sigma_qk": "σ(W_K W_Qᵀ)",
    "sigma_qk_at_start": "σ(W_K W_Qᵀ) at the start",
    "sigma_qk_growth": "σ(W_K W_Qᵀ) / its first value",
    "grad_linf": "largest attention gradient",
    "grad_linf_at_start": "largest attention gradient at the start",
    "grad_linf_growth": "largest attention gradient / its first value",
    "grad_l2": "norm of the attention gradient",
    "update_sigma": "σ of the last update",
    "update_entropy": "spectral entropy of the last update (nats)",
    "loss": "loss",
    "loss_at_start": "loss at the start",
    "layers": "layers",
    "uniform_layers": "uniform layers",
    "worst_head": "worst head",
    "call": "attention call",
}
_COUNTS = {"start_step", "layers", "uniform_layers", "worst_head", "call"}


def evidence_rows(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of every figure; the attention map is left out, and so is a call that is the first."""
    return [
        (_LABELS.get(key, key.replace("_", " ")), _text(key, value))
        for key, value in evidence.items()
        if isinstance(value, (int, float, str))
        and not isinstance(value, bool)
        and key != "map"
        and not (key == "call" and value == 0)
    ]


def _text(key: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) and abs(value) >= 1 << 53:  # beyond what a float holds
        return f"{value:,}"
    if key in _COUNTS:
        return f"{value:,.0f}"
    if "share" in key:
        return percent(value)
    if key.endswith("_growth"):
        return times(value)
    return f"{value:,}" if isinstance(value, int) else number(value)

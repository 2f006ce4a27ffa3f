"""What columns are called on axes: symbols of the field, and their units."""

from __future__ import annotations

from entropy_monitor.frames import SHARE
from entropy_monitor.records import HEADS, LAYERS

_LABELS = {
    SHARE: "entropy / maximum",
    "entropy": "entropy (nats)",
    "entropy_se": "standard error of entropy (nats)",
    "rows_read": "query rows read",
    "max_entropy": "maximal entropy (nats)",
    "max_logit": "largest logit",
    "floor_row": "row floor (nats)",
    "floor_activation": "activation floor (nats)",
    "floor_weights": "weight floor (nats)",
    "floor_paper": "B(σ_QK, n) (nats)",
    "sigma_qk": "σ_QK = ‖W_K W_Qᵀ‖₂",
    "sigma_q": "‖W_Q‖₂",
    "sigma_k": "‖W_K‖₂",
    "sigma_v": "‖W_V‖₂",
    "sigma_o": "‖W_O‖₂",
    "grad_linf": "ℓ∞ gradient norm",
    "grad_l2": "ℓ2 gradient norm",
    "update_sigma": "‖ΔW‖₂ of an update",
    "update_entropy": "spectral entropy (nats)",
}


def label(column: str) -> str:
    """An axis label for a column of `heads` or `layers`, with its unit where it has one."""
    return _LABELS.get(column, column)


def symbol(column: str) -> str:
    """The label without unit and definition."""
    return label(column).split(" = ")[0].split(" (nats)")[0]


def sentence(column: str) -> str:
    """What a column holds, in words."""
    spec = HEADS if column in HEADS.names else LAYERS
    return spec[column].doc.removesuffix(" of this head") if column in spec.names else label(column)


def low_is_bad(column: str) -> bool:
    """Whether the lowest head is the one to look at: so it is of entropies and floors."""
    return "entropy" in column or column.startswith("floor")


def spans_decades(column: str) -> bool:
    """Whether a column's values are compared by their ratio: norms and gradients are."""
    return column.startswith(("sigma", "grad", "update_sigma"))

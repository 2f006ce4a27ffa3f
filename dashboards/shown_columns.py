"""What pages can show of a head and of a layer: names for people, units, and which end is the bad one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from entropy_monitor.records import ABOVE_FLOOR, SHARE


@dataclass(frozen=True)
class ShownColumn:
    """A column as pages show it.

    Attributes:
        name: the column's name in the records, or that of a derived one.
        label: a few words.
        unit: of its values; empty for a ratio or a norm.
        scale: how colours and axes spread: `share` from 0 to 1, `linear`, `log`.
        bad: which end is the worrying one; the worse value of several is shown.
        text: what it is, in a sentence.
    """

    name: str
    label: str
    unit: str
    scale: Literal["share", "linear", "log"]
    bad: Literal["low", "high"]
    text: str


HEAD_COLUMNS: tuple[ShownColumn, ...] = (
    ShownColumn(
        SHARE,
        "entropy / maximum",
        "",
        "share",
        "low",
        "Attention entropy over the logarithm of the number of keys: 1 is uniform attention, 0 a single key.",
    ),
    ShownColumn(
        ABOVE_FLOOR,
        "entropy above its row floor",
        "nats",
        "linear",
        "low",
        "Entropy minus the least that its logits allow (Theorem 3.1, row by row): near 0, the head is as "
        "sharp as its logits can make it.",
    ),
    ShownColumn(
        "sigma_qk",
        "σ_QK",
        "",
        "log",
        "high",
        "Spectral norm of the head's W_K W_Qᵀ: the larger it is, the sharper attention can become.",
    ),
    ShownColumn(
        "max_logit", "largest logit", "", "linear", "high", "The largest logit that the softmax sees."
    ),
    ShownColumn("entropy", "entropy", "nats", "linear", "low", "Mean attention entropy of the rows read."),
    ShownColumn(
        "max_entropy",
        "largest possible entropy",
        "nats",
        "linear",
        "low",
        "Mean of log n over the same rows, n being the number of keys a row sees.",
    ),
    ShownColumn(
        "entropy_se",
        "standard error of the entropy",
        "nats",
        "linear",
        "high",
        "From reading some of the rows only; 0 where all were read.",
    ),
    ShownColumn(
        "floor_row",
        "floor: logits of each row",
        "nats",
        "linear",
        "low",
        "Theorem 3.1 from each row's logits.",
    ),
    ShownColumn(
        "floor_activation",
        "floor: norms of q and k",
        "nats",
        "linear",
        "low",
        "Theorem 3.1 from the norms of queries and keys.",
    ),
    ShownColumn(
        "floor_weights",
        "floor: weights and inputs",
        "nats",
        "linear",
        "low",
        "Theorem 3.1 from σ_QK and the norms of the inputs.",
    ),
    ShownColumn(
        "floor_paper",
        "B(σ_QK, n), the paper's curve",
        "nats",
        "linear",
        "low",
        "The paper's own bound, for inputs of norm 1 and unscaled logits; no floor of real models.",
    ),
    ShownColumn("sigma_q", "σ(W_Q)", "", "log", "high", "Spectral norm of the head's query projection."),
    ShownColumn("sigma_k", "σ(W_K)", "", "log", "high", "Spectral norm of the head's key projection."),
)
"""In the order of the menu; every figure of `records.HEADS` and two derived from them."""

LAYER_COLUMNS: tuple[ShownColumn, ...] = (
    ShownColumn("sigma_q", "σ(W_Q) of the layer", "", "log", "high", "Spectral norm of the whole W_Q."),
    ShownColumn("sigma_k", "σ(W_K) of the layer", "", "log", "high", "Spectral norm of the whole W_K."),
    ShownColumn("sigma_v", "σ(W_V) of the layer", "", "log", "high", "Spectral norm of the whole W_V."),
    ShownColumn("sigma_o", "σ(W_O) of the layer", "", "log", "high", "Spectral norm of the whole W_O."),
    ShownColumn(
        "grad_linf",
        "largest attention gradient",
        "",
        "log",
        "high",
        "Largest absolute gradient of the layer's attention weights.",
    ),
    ShownColumn("grad_l2", "norm of the attention gradient", "", "log", "high", "Its Euclidean norm."),
    ShownColumn(
        "update_sigma",
        "σ of the last update",
        "",
        "log",
        "high",
        "Larger spectral norm of the last updates of W_Q and W_K.",
    ),
    ShownColumn(
        "update_entropy",
        "spectral entropy of the last update",
        "nats",
        "linear",
        "low",
        "How many directions those updates spread over, as the entropy of their squared singular values.",
    ),
)
"""Every figure of `records.LAYERS`."""

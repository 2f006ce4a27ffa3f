"""One call of attention, in one form whatever the way it was called.

Shapes: B batch, H query heads, K key heads (H % K == 0; query head h uses key head h // (H / K)),
T queries, S keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from entropy_monitor.hooks.projections import Projection

Role = Literal["query", "key", "value", "output"]


@dataclass(frozen=True)
class Inputs:
    """What enters a dot-product attention: enough to recompute its logits.

    Attributes:
        q: `[B, H, T, D]`, as it enters the product, in the dtype that the kernel sees.
        k: `[B, K, S, D]`.
        mask: boolean (True = seen) or additive, broadcastable to `[B, H, T, S]`.
        is_causal: upper-left aligned causal mask, on top of `mask`.
        scale: factor of q·k; None where it is not told (hand-written attention: fitted to the logits).
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None


@dataclass(frozen=True)
class Seen:
    """What a source reads from one function call, before its owner is known.

    Attributes:
        source: the function's name.
        inputs: q, k and masks, where they are known.
        logits: `[B, H, T, S]` as they enter the softmax; None for fused attention.
        value: `[B, K, S, D_v]`, where it is an argument.
        projections: those that the call names itself.
        extra_keys: keys that no projection of the input made (`bias_k`, `add_zero_attn`).
        output_size: elements of the call's output, to recognise the output projection; 0 if not known yet.
    """

    source: str
    inputs: Inputs | None
    logits: Tensor | None = None
    value: Tensor | None = None
    projections: dict[Role, Projection] = field(default_factory=dict)
    extra_keys: bool = False
    output_size: int = 0


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of a forward.

    Attributes:
        layer: qualified name of the owner: the module whose forward ran the projections, or else the innermost
            that called.
        call: nth call of this owner in this forward, from 0.
        source: the function that was called.
        inputs: q, k and masks, where they are known.
        logits: `[B, H, T, S]` as they enter the softmax, for hand-written attention.
        query: where q comes from; None where that could not be told.
        key: likewise for k.
        extra_keys: keys that no projection of the input made.
        attention: how rows are normalised.
    """

    layer: str
    call: int
    source: str
    inputs: Inputs | None
    logits: Tensor | None
    query: Projection | None
    key: Projection | None
    extra_keys: bool = False
    attention: str = "softmax"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequences B, query heads H, queries T."""
        rows = self.inputs.q if self.logits is None and self.inputs is not None else self.logits
        if rows is None:
            raise ValueError(f"attention call of {self.layer}: neither inputs nor logits")
        return rows.shape[0], rows.shape[1], rows.shape[2]

"""One call of attention, in one form whatever the way it was called.

Shapes: B batch, H query heads, K key heads (H % K == 0; query head h uses key head h // (H / K)),
T queries, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from entropy_monitor.hooks.lineage import Origin
from entropy_monitor.hooks.logits import Scale
from entropy_monitor.hooks.projections import Projection

Role = Literal["query", "key", "value", "output"]
Modify = Callable[[Tensor, slice, slice, Tensor], tuple[Tensor, Tensor | None]]
"""What a kernel does to logits before their softmax; see `measures.row_statistics`."""


@dataclass(frozen=True)
class Inputs:
    """What enters a dot-product attention: enough to recompute its logits.

    Attributes:
        q: `[B, H, T, D]`, as it enters the product, in the dtype that the kernel sees.
        k: `[B, K, S, D]`.
        mask: boolean (True = seen) or additive, broadcastable to `[B, H, T, S]`.
        is_causal: upper-left aligned causal mask, on top of `mask`.
        scale: factor of q·k, after the soft-cap if there is one; None where it is not known.
        inner: factor of q·k before a soft-cap tanh; None without one.
        modify: what else is done to the logits, and which keys it hides; None where nothing is.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None = None
    is_causal: bool = False
    scale: Scale | None = None
    inner: Scale | None = None
    modify: Modify | None = None


def fused_factors(inputs: Inputs) -> tuple[float, float | None]:
    """Scale and soft-cap of fused attention, in the measures' terms: `cap · tanh(scale · q·k / cap)`.

    Raises:
        TypeError: if the scale is a tensor: fused attention has one, a number.
    """
    if not isinstance(inputs.scale, float) or isinstance(inputs.inner, Tensor):
        raise TypeError("fused attention has one scale, got a tensor or none")
    if inputs.inner is None:
        return inputs.scale, None
    return inputs.inner * inputs.scale, inputs.scale


@dataclass(frozen=True)
class Seen:
    """What a source reads from one function call, before its owner is known.

    Attributes:
        source: the function's name.
        inputs: q, k and masks, where they are known.
        logits: `[B, H, T, S]` as they enter the softmax, or whatever makes weights of them; None for fused
            attention.
        weights: `[B, H, T, S]`, what values are multiplied with, where a softmax did not make it.
        attention: how rows are normalised.
        value: the values, where they are an argument.
        tensors: q `[B, H, T, D]` and k `[B, K, S, D]` as they left their projections' side.
        origins: where these come from.
        projections: those that the call names itself.
        extra_keys: keys that no projection of the input made (`bias_k`, `add_zero_attn`).
        output_size: elements of the call's output, to recognise the output projection; 0 if not known yet.
    """

    source: str
    inputs: Inputs | None
    logits: Tensor | None = None
    value: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, Origin | None] = field(default_factory=dict)
    projections: dict[Role, Projection] = field(default_factory=dict)
    extra_keys: bool = False
    output_size: int = 0
    weights: Tensor | None = None
    attention: str = "softmax"

    @property
    def heads(self) -> int:
        """Query heads that are here."""
        rows = self.inputs.q if self.inputs is not None else self.logits
        return 0 if rows is None else rows.shape[1]

    @property
    def width(self) -> int:
        """Query features of all heads that are here; 0 where they are not known."""
        return 0 if self.inputs is None else self.inputs.q.shape[1] * self.inputs.q.shape[-1]


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of a forward.

    Attributes:
        layer: qualified name of the owner: the module whose forward ran the projections, or else the
            innermost that called.
        call: nth call of this owner in this forward, from 0.
        source: the function that was called.
        inputs: q, k and masks, where they are known.
        logits: `[B, H, T, S]` as they enter the softmax, for hand-written attention.
        query: where q comes from; None where that could not be told.
        key: likewise for k.
        extra_keys: keys that no projection of the input made.
        attention: how rows are normalised: `softmax`, or what makes the weights instead (`relu`, `sigmoid`,
            …), with "(normalised)" where they do not sum to one: the figures are those of the rows divided
            by their sums.
        weights: `[B, H, T, S]`, for attention without a softmax.
        reasons: role to why its projection is not known.
        first_head: number of its first query head among those of all processes.
        ranks: the processes that work on the same sequences, each with its part of some weights or
            with copies of the others'; empty where this one works on its own.
        sharded: whether this process holds only a part of some weight near it.
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
    weights: Tensor | None = None
    reasons: Mapping[Role, str] = field(default_factory=dict)
    first_head: int = 0
    ranks: tuple[int, ...] = ()
    sharded: bool = False

    @property
    def rows(self) -> Tensor:
        """A tensor whose first three dimensions are B, H and T."""
        if self.logits is not None:
            return self.logits
        if self.inputs is None:
            raise ValueError(f"attention call of {self.layer}: neither inputs nor logits")
        return self.inputs.q

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sequences B, query heads H, queries T."""
        b, h, t = self.rows.shape[:3]
        return b, h, t


class Receiver(Protocol):
    """What is told of each attention call, inside the forward, without gradients."""

    def expect(self, calls: Sequence[tuple[str, int]]) -> None:
        """Layers and calls in the order in which they are written: compiled code may run in another."""

    def attention(self, call: AttentionCall) -> None:
        """One attention call, before the function itself runs."""

    def projection(self, layer: str, role: Role, projection: Projection) -> None:
        """W_V or W_O of a layer, as soon as it is known."""

    def retract(self, layer: str, role: Role) -> None:
        """What was told of a projection was wrong, or not all of it."""

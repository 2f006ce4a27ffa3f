"""The largest logit of each head, in the forwards of a training step, and the weights behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from entropy_monitor import measures
from entropy_monitor.hooks.calls import AttentionCall, Inputs, Modify, Role
from entropy_monitor.hooks.logits import Scale
from entropy_monitor.hooks.projections import Projection
from entropy_monitor.measures._precision import exact, matmul, working_dtype
from entropy_monitor.remedies.qk_clip.head_weights import (
    HeadWeights,
    NotScalableError,
    head_weights,
    is_linear,
)

_BLOCK = 64  # rows at a time
_NORMED = (
    "{} are normalised (QK-norm) or changed otherwise after their projection, so that scaling its weights "
    "does not scale the logits; QK-norm bounds them already by its gains: QK-clip has nothing to do here"
)


@dataclass
class Unit:
    """Heads of attention that are made by the same weights, in one layer or in several that share them.

    Attributes:
        layer: the first of these layers.
        query: where the weights of its query heads lie.
        key: where those of its key heads lie; None where they are not to be scaled.
        maxima: largest logit of each query head, `[H]`.
    """

    layer: str
    query: HeadWeights
    key: HeadWeights | None
    maxima: Tensor


class LargestLogits:
    """The watcher's receiver: nothing but the largest logits, and which weights made them.

    Args:
        rows: query rows to read of each sequence, or "all".
        names: of the model's parameters.
        wanted: which layers to read.

    Attributes:
        refused: layers whose logits cannot be scaled through their weights, and why.
    """

    def __init__(
        self, rows: int | Literal["all"], names: Mapping[nn.Parameter, str], wanted: Callable[[str], bool]
    ) -> None:
        self.refused: dict[str, str] = {}
        self._rows = rows
        self._names = names
        self._wanted = wanted
        self._units: dict[tuple[object, ...], Unit] = {}
        self._of_call: dict[tuple[str, int], Unit] = {}
        self._told: set[str] = set()
        self._values: list[HeadWeights] = []
        self._frozen = False
        self._lock = threading.RLock()  # a model may run on several threads
        self._step = 0

    def begin(self, step: int) -> None:
        """Forget the logits, and read for another step."""
        with self._lock:
            self._step = step
            for unit in self._units.values():
                unit.maxima = torch.full_like(unit.maxima, -torch.inf)

    def units(self) -> list[Unit]:
        """What was found, in order of execution; refuses those whose queries' weights do more than that.

        Keys that others use as well, or that are frozen, are left out of each.
        """
        with self._lock:
            if not self._frozen:  # processes agreed on what to compare
                self._refuse_shared()
            found = list(self._units.values())
            return [replace(unit, key=self._own_key(unit, found)) for unit in found]

    def freeze(self) -> None:
        """Take no further layers."""
        self._frozen = True

    def expect(self, calls: Sequence[tuple[str, int]]) -> None:
        """See `Receiver`."""

    def retract(self, layer: str, role: Role) -> None:
        """See `Receiver`."""

    def projection(self, layer: str, role: Role, projection: Projection) -> None:
        """See `Receiver`; keys must not be scaled with weights that make values too."""
        if role != "value" or (layer, 0) not in self._of_call:
            return
        try:
            value = head_weights(projection, self._names)
        except NotScalableError:
            return
        with self._lock:
            if all(value.identity != other.identity for other in self._values):
                self._values.append(value)

    def attention(self, call: AttentionCall) -> None:
        """See `Receiver`."""
        if call.attention != "softmax" or call.layer in self.refused:
            return
        with self._lock:
            try:
                if not self._chosen(call.layer):
                    return
                unit = self._unit(call)
                if unit is not None:
                    top = largest_logits(call, self._rows_of(call)).to(unit.maxima)
                    unit.maxima = torch.maximum(unit.maxima, top)
            except NotScalableError as error:
                self.refused[call.layer] = str(error)

    def _chosen(self, layer: str) -> bool:
        try:
            return self._wanted(layer)
        except Exception as error:
            raise NotScalableError(
                f"the function given by layers= failed ({type(error).__name__}: {error})"
            ) from error

    def _refuse_shared(self) -> None:
        reasons = {place: self._shared_query(unit) for place, unit in self._units.items()}
        for place, why in reasons.items():
            if why:
                self.refused[self._units.pop(place).layer] = why

    def _shared_query(self, unit: Unit) -> str:
        """What else the weights of a unit's queries make, as a reason; empty where nothing."""
        if any(value.overlaps(unit.query) for value in self._values):
            return "the weights of its queries make values too, which would be scaled along"
        for other in self._units.values():
            if other is unit:
                continue
            name = "another call" if other.layer == unit.layer else other.layer
            if other.query.overlaps(unit.query):
                return (
                    f"the weights of its queries make those of {name} too, with other keys, whose logits "
                    "would be scaled along"
                )
            if other.key is not None and other.key.overlaps(unit.query):
                return f"the weights of its queries make the keys of {name} too"
        return ""

    def _unit(self, call: AttentionCall) -> Unit | None:
        place = (call.layer, call.call)
        unit = self._of_call.get(place)
        if unit is not None and call.layer in self._told:
            return unit
        if self._frozen:
            if all(layer != call.layer for layer, _ in self._of_call):
                raise NotScalableError(
                    "it ran for the first time after the first step, when processes had agreed on the layers "
                    "to compare; make the QKClip when all layers run"
                )
            return unit
        query, key = self._parts(call)
        if unit is None:
            identity = (*query.identity, *(() if key is None else key.identity))
            maxima = torch.full(
                (query.heads,), -torch.inf, dtype=working_dtype(call.rows), device=call.rows.device
            )
            fresh = Unit(call.layer, query, key, maxima)
            unit = self._of_call[place] = self._units.setdefault(identity, fresh)
        return unit

    def _parts(self, call: AttentionCall) -> tuple[HeadWeights, HeadWeights | None]:
        q, k, inputs = call.query, call.key, call.inputs
        if q is None or k is None:
            role: Role = "query" if q is None else "key"
            reason = call.reasons.get(role, "unknown")
            raise NotScalableError(
                f"where its {'queries' if q is None else 'keys'} come from is not known ({reason}); "
                "em.register_projections can tell"
            )
        if inputs is None or inputs.scale is None:
            raise NotScalableError("how its logits are made from queries and keys is not known")
        query, key = head_weights(q, self._names), self._key(k)
        if query.heads != call.shape[1]:
            raise NotScalableError(f"{call.shape[1]} query heads are made by {query.heads} heads of weights")
        verdicts = [is_linear(inputs.q, q), True if key is None else is_linear(inputs.k, k)]
        for role_name, verdict in zip(("queries", "keys"), verdicts, strict=True):
            if verdict is False:
                raise NotScalableError(f"its {_NORMED.format(role_name)}")
        if key is not None and query.overlaps(key):
            raise NotScalableError("queries and keys share their weights, which cannot be scaled one by one")
        if None not in verdicts:
            self._told.add(call.layer)
        return query, key

    def _key(self, projection: Projection) -> HeadWeights | None:
        """Where key heads lie; None where one is shared in a way that only queries can make up for."""
        if projection.certain is not None and bool(projection.certain.isnan()):
            return None
        return head_weights(projection, self._names)

    def _own_key(self, unit: Unit, units: Sequence[Unit]) -> HeadWeights | None:
        """A unit's key, unless it is frozen, or other queries or values are made with it."""
        key = unit.key
        if key is None or key.is_frozen or any(value.overlaps(key) for value in self._values):
            return None
        for other in units:
            shared = other.query.overlaps(key) or (other.key is not None and other.key.overlaps(key))
            if other is not unit and shared:
                return None
        return key

    def _rows_of(self, call: AttentionCall) -> Tensor | None:
        tokens = call.shape[2]
        if self._rows == "all" or self._rows >= tokens:
            return None
        return measures.stratified_rows(tokens, self._rows, self._step, call.rows.device)


@torch.no_grad()
def largest_logits(call: AttentionCall, rows: Tensor | None = None) -> Tensor:
    """The largest scaled product of a query and a key that it sees, before soft-caps and biases, `[H]`.

    Args:
        call: of attention, with its inputs and scale known.
        rows: of queries to look at; all by default.

    Returns:
        float32, or float64 for such inputs; -inf for a head without a visible key.
    """
    inputs = call.inputs
    if inputs is None or inputs.scale is None:
        raise ValueError(f"{call.layer}: how its logits are made is not known")
    scale: Scale = inputs.scale if inputs.inner is None else inputs.inner
    if call.logits is not None:
        return _from_product(inputs, scale, call.logits, rows)
    mask = None if inputs.mask is None else ~measures.hidden(inputs.mask)
    stats = measures.row_statistics(
        inputs.q,
        inputs.k,
        mask=mask,
        is_causal=inputs.is_causal,
        scale=float(scale),
        rows=rows,
        modify=None if inputs.modify is None else _only_hides(inputs.modify),
    )
    seen = stats.num_keys > 0
    return torch.where(seen, stats.max_logit, -torch.inf).amax((0, 2))


def _only_hides(modify: Modify) -> Modify:
    def hide(logits: Tensor, sequences: slice, heads: slice, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return logits, modify(logits, sequences, heads, rows)[1]

    return hide


def _from_product(inputs: Inputs, scale: Scale, logits: Tensor, rows: Tensor | None) -> Tensor:
    """For attention written by hand, whose logits tell which keys are hidden."""
    tokens = logits.shape[2]
    dtype = working_dtype(inputs.q, inputs.k)
    top = torch.full((logits.shape[1],), -torch.inf, dtype=dtype, device=logits.device)
    with exact(logits.device):
        k = inputs.k.to(dtype).transpose(-1, -2).unsqueeze(2)
        count = tokens if rows is None else rows.shape[0]
        for i in range(0, count, _BLOCK):
            chosen = slice(i, i + _BLOCK) if rows is None else rows[i : i + _BLOCK]
            q = torch.unflatten(inputs.q[:, :, chosen].to(dtype), 1, (inputs.k.shape[1], -1))
            made = matmul(q, k).flatten(1, 2) * scale
            made = made.masked_fill(measures.hidden_logits(logits[:, :, chosen]), -torch.inf)
            top = torch.maximum(top, made.amax((0, 2, 3)))
    return top

"""Spectral norms of each head's projections, computed when the weights have changed and not before."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from entropy_monitor import measures
from entropy_monitor.hooks.calls import AttentionCall
from entropy_monitor.hooks.projections import Projection
from entropy_monitor.hooks.storage import storage_of, version_of

_SAMPLED = (64, 16)  # rows and columns of a weight that tell whether it is the same at another step


@dataclass(frozen=True)
class HeadSigmas:
    """Spectral norms of each head's projections, `[H]` each; NaN where the projections are not known.

    They are never below the norms; see `measures.head_norms` for how far above.

    Attributes:
        sigma_q: `‖W_Q,h‖₂`.
        sigma_k: `‖W_K,g(h)‖₂` of the key head that query head h uses.
        sigma_qk: `‖W_K,g(h) W_Q,hᵀ‖₂`.
        query_bias: `‖W_K,g(h) b_q,h‖₂`, 0 without a query bias.
    """

    sigma_q: Tensor
    sigma_k: Tensor
    sigma_qk: Tensor
    query_bias: Tensor


@torch.no_grad()
def head_sigmas(call: AttentionCall) -> HeadSigmas:
    """Spectral norms of the projections that made a call's q and k; waits for no accelerator."""
    _, heads, _ = call.shape
    unknown = torch.full((heads,), math.nan, device=call.rows.device)
    q, k = call.query, call.key
    w_q = None if q is None or q.layout.heads != heads else _weights(q)
    w_k = None if k is None or heads % k.layout.heads else _weights(k)
    if q is None or w_q is None or w_k is None or w_q.shape[-1] != w_k.shape[-1]:
        sigma_q = unknown if w_q is None else measures.head_norm(w_q)
        sigma_k = unknown
        if w_k is not None:
            sigma_k = measures.head_norm(w_k).repeat_interleave(heads // w_k.shape[0])
        return HeadSigmas(sigma_q, sigma_k, unknown, unknown)
    bias = q.head_biases()
    query_bias = torch.zeros_like(unknown) if bias is None else measures.bias_norm(w_k, bias)
    return HeadSigmas(*measures.head_norms(w_q, w_k), query_bias)


class HeadSigmaCache:
    """`head_sigmas` of calls whose weights are those of an earlier call, without computing them again.

    Within a step a weight is the same while it is the same tensor, unwritten; one that is computed anew in
    each forward is told by the parameters behind it. From one step to the next that is not enough: many
    optimizers and moving averages write through `.data`, which torch does not count, and gathered weights
    are written behind its back. There the weights' products with a fixed vector, the query bias and a sample
    of 64 x 16 numbers of each weight have to be equal as well. So every change is noticed that moves such a
    product, a sum over a row of the weight with factors up to 1, by more than its rounding: in float32 by
    about 1e-7 of the row's norm, in bfloat16 by 1 %. That takes 2 to 5 % of the time of the norms. It is
    looked at on the CPU alone; elsewhere, and for what is sharded, norms are computed at every step.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, int], _Entry] = {}

    def begin(self) -> None:
        """A new step: what cannot be told to be the same is computed again."""
        for entry in self._entries.values():
            entry.is_of_this_step = False

    def of(self, call: AttentionCall) -> HeadSigmas:
        """`head_sigmas(call)`."""
        place = (call.layer, call.call)
        entry = self._entries.get(place)
        if entry is None or not entry.matches(call):
            # Another call of the layer in this forward has the same weights.
            others = (e for (layer, _), e in self._entries.items() if layer == call.layer)
            entry = next((e for e in others if e.is_of_this_step and e.matches(call)), None)
            entry = self._entries[place] = entry or _Entry(call)
        entry.is_of_this_step = True
        return entry.sigmas


class _Entry:
    """What one call's weights were, and their norms."""

    def __init__(self, call: AttentionCall) -> None:
        self.sigmas = head_sigmas(call)
        self.is_of_this_step = True
        self._shape = call.shape[1], call.rows.device
        self._places = _places(call)
        self._tensors = [(weakref.ref(t), version_of(t)) for t in _tensors(call)]
        bias = _query_bias(call)
        self._bias = None if bias is None else _Memory(bias)
        self._sample = _sample(call)

    def matches(self, call: AttentionCall) -> bool:
        """Whether a call has the weights of this entry."""
        tensors = _tensors(call)
        if self._shape != (call.shape[1], call.rows.device) or self._places != _places(call):
            return False
        if any(p is not None and p.certain is not None for p in (call.query, call.key)):
            return False
        if len(tensors) != len(self._tensors) or not all(
            ref() is t and version == version_of(t) != -1
            for (ref, version), t in zip(self._tensors, tensors, strict=True)
        ):
            return False
        bias = _query_bias(call)
        if self._bias is not None and (bias is None or not self._bias.is_of(bias)):
            return False
        if self.is_of_this_step:
            return True
        if self._sample is None or (sample := _sample(call)) is None:
            return False
        return all(map(torch.equal, self._sample, sample))


class _Memory:
    """Where a tensor lies and whether it was written: of a bias each forward makes another alias."""

    def __init__(self, tensor: Tensor) -> None:
        self._identity = storage_of(tensor)
        self._version = version_of(tensor)
        self._place = _place_in_memory(tensor)
        # While it is held, nothing else can come to lie there.
        self._alive = None if self._identity is None else StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def is_of(self, tensor: Tensor) -> bool:
        """Whether a tensor is this one, unwritten."""
        is_there = self._identity is not None and storage_of(tensor) == self._identity
        return (
            is_there and _place_in_memory(tensor) == self._place and version_of(tensor) == self._version != -1
        )


def _place_in_memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return int(tensor.storage_offset()), tensor.shape, tensor.stride()


def _weights(projection: Projection) -> Tensor:
    """W of each head, `[H, d_model, d_head]`, in its own dtype: a view wherever one can be had."""
    weights = projection.place.read(projection.weight).flatten(0, 1)
    return weights if projection.certain is None else weights * projection.certain


def _tensors(call: AttentionCall) -> list[Tensor]:
    """What changes when the weights do."""
    found: list[Tensor] = []
    for projection in (call.query, call.key):
        if projection is not None:
            found += projection.parameters or (projection.weight,)
    return found


def _places(call: AttentionCall) -> list[object]:
    return [None if p is None else (p.place, p.bias is None) for p in (call.query, call.key)]


def _query_bias(call: AttentionCall) -> Tensor | None:
    return None if call.query is None or call.query.bias is None else call.query.bias.detach()


def _sample(call: AttentionCall) -> list[Tensor] | None:
    """What tells the weights' values; None where one may not look at them or they may be someone else's."""
    if call.sharded or call.rows.device.type != "cpu":
        return None
    found = []
    for projection in (call.query, call.key):
        if projection is None:
            continue
        if projection.shard is not None:
            return None
        w = projection.weight.detach()
        rows, columns = (max(1, n // count) for n, count in zip(w.shape, _SAMPLED, strict=True))
        found.append(w[::rows, ::columns].clone())
    found += _products(call)
    bias = _query_bias(call)
    return found if bias is None else [*found, bias.clone()]


def _products(call: AttentionCall) -> list[Tensor]:
    """The weights times a vector of numbers that differ; rows that q and k have in common are read once."""
    spans: list[tuple[Tensor, int, int]] = []
    for projection in (call.query, call.key):
        if projection is None:
            continue
        w, first, last = projection.weight.detach(), projection.layout.base, projection.layout.last + 1
        if spans and _Memory(spans[0][0]).is_of(w):
            spans = [(w, min(first, spans[0][1]), max(last, spans[0][2]))]
        else:
            spans.append((w, first, last))
    with torch.autocast("cpu", enabled=False):
        return [
            torch.mv(w[first:last], torch.arange(w.shape[1], dtype=w.dtype).cos()) for w, first, last in spans
        ]

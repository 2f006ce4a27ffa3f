"""Gathers what the watcher sees during one step, and hands it over in one piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from entropy_monitor import measures
from entropy_monitor.hooks.calls import AttentionCall, Role
from entropy_monitor.hooks.head_sigmas import HeadSigmaCache
from entropy_monitor.hooks.layer_sigmas import LayerSigmas
from entropy_monitor.hooks.maps import evidence_map, full_map
from entropy_monitor.hooks.projections import Projection, WeightPart
from entropy_monitor.hooks.reading import CallReading, RowCount
from entropy_monitor.hooks.unread import UnreadError
from entropy_monitor.hooks.visibility import Visibility, sample

LAYER_FIGURES: tuple[Role, ...] = ("query", "key", "value", "output")


@dataclass(frozen=True)
class HeadIndex:
    """Which rows of a harvest belong to which call."""

    layer: str
    layer_index: int
    call: int
    heads: int
    attention: str
    first_head: int = 0


@dataclass(frozen=True)
class Harvest:
    """One step's figures, still on the device.

    Attributes:
        step: the training step.
        index: what the figures belong to, in order.
        figures: `[len(FIGURES), Σ heads]`, float32, on the device of the model.
        layers: qualified name and layer index of each row of `sigmas`.
        sigmas: `[layers, 4]`: spectral norms of the whole W_Q, W_K, W_V, W_O.
        maps: pooled attention map of every head that is here, of the first sequence, by (layer, call).
    """

    step: int
    index: tuple[HeadIndex, ...]
    figures: Tensor
    layers: tuple[tuple[str, int], ...]
    sigmas: Tensor
    maps: dict[tuple[str, int], Tensor]

    def map_of(self, layer: str, call: int, head: int) -> Tensor | None:
        """The pooled map of one head, by its number among all; None where none was kept.

        Raises:
            IndexError: the head is not among those that are here.
        """
        maps = self.maps.get((layer, call))
        first = next((i.first_head for i in self.index if (i.layer, i.call) == (layer, call)), 0)
        if maps is None:
            return None
        if not 0 <= head - first < len(maps):
            raise IndexError(f"{layer} has heads {first}…{first + len(maps) - 1} here, not {head}")
        return maps[head - first]


@dataclass
class LayerParts:
    """What is known of a layer beside its rows, for `describe` and for reading gradients and updates.

    Attributes:
        index: place in order of execution.
        heads: query heads.
        source: function that computes its attention.
        attention: how rows are normalised: `softmax`, `relu`, …
        key_heads: heads of k; fewer where query heads share them, 0 where it could not be told.
        head_size: features of a head of q, 0 where it could not be told.
        calls: attention calls within one forward that were read; 0 where reading failed.
        visibility: what its rows see, by its first call; None where it could not be told.
        projections: role to how it was identified.
        reasons: role to why its projection is not known.
        weights: the parameter behind each projection, and which part of it.
        ranks: see `AttentionCall`.
        reading: which rows were read last, and by what.
        sharded: whether it has weights of which a process holds only a part, or that are copies of others'.
    """

    index: int
    heads: int
    source: str
    attention: str = "softmax"
    key_heads: int = 0
    head_size: int = 0
    calls: int = 0
    visibility: Visibility | None = None
    projections: dict[Role, str] = field(default_factory=dict)
    reasons: dict[Role, str] = field(default_factory=dict)
    weights: dict[Role, WeightPart] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    sharded: bool = False
    reading: str = ""

    @classmethod
    def of(cls, index: int, call: AttentionCall) -> LayerParts:
        """What a layer's first call tells."""
        parts = cls(index, call.shape[1], call.source, call.attention)
        q, k, inputs = call.query, call.key, call.inputs
        if inputs is not None:
            parts.key_heads, parts.head_size = inputs.k.shape[1], inputs.q.shape[-1]
        elif q is not None and k is not None:
            parts.key_heads, parts.head_size = k.layout.heads, q.layout.head_size
        return parts


class Recorder:
    """The watcher's receiver: figures of every call, and spectral norms of every layer's weights.

    Args:
        rows: query rows to read of each sequence, or "all".
        adapt_to_batch: read more of each sequence where a batch has few; see `measures.rows_for`.
        want_map: which heads' full maps to keep, by layer and call: None for none, a list of heads, or "all".

    Attributes:
        rows: as given; may be changed between steps.
        adapt_to_batch: as given.
        layers: what is known of each layer, by its name.
        rejected: layers of which nothing can be read, and why.
        full_maps: of each layer, of its latest forward.
    """

    def __init__(
        self,
        rows: RowCount,
        *,
        adapt_to_batch: bool = False,
        want_map: Callable[[str], list[int] | str | None] | None = None,
    ) -> None:
        self.layers: dict[str, LayerParts] = {}
        self.rejected: dict[str, str] = {}
        self.full_maps: dict[str, list[Tensor]] = {}
        self.rows = rows
        self.adapt_to_batch = adapt_to_batch
        self._want_map = want_map
        self._order: dict[tuple[str, int], int] = {}  # of execution, by layer and call
        self._indices: dict[str, int] = {}
        self._head_sigmas = HeadSigmaCache()
        self._layer_sigmas = LayerSigmas()
        self._lock = threading.RLock()  # a model may run on several threads
        self.begin(0)

    def begin(self, step: int, suspects: Collection[str] = (), *, in_full: bool = True) -> None:
        """Forget what was read and read for another step.

        Args:
            step: its number.
            suspects: layers that are read in full anyway, and of which a pooled attention map is kept, for
                alerts.
            in_full: read the spectral norms of weights, and the floors that rest on norms, too.
        """
        self._step = step
        self._in_full = in_full
        self._suspects = suspects
        self._head_sigmas.begin()
        self._readings: dict[tuple[str, int], CallReading] = {}
        self._sigmas: dict[tuple[str, Role], Tensor] = {}
        self._broken: set[tuple[str, int]] = set()
        self._row_cache: dict[tuple[int, int, torch.device], Tensor] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read since `begin`."""
        return not self._readings

    def expect(self, calls: Sequence[tuple[str, int]]) -> None:
        """See `Receiver`."""
        with self._lock:
            for layer, call in calls:
                self._order.setdefault((layer, call), len(self._order))
                self._indices.setdefault(layer, len(self._indices))

    def attention(self, call: AttentionCall) -> None:
        """See `Receiver`."""
        with self._lock:
            try:
                self._read(call)
            except UnreadError as error:
                self.rejected[call.layer] = str(error)

    def projection(self, layer: str, role: Role, projection: Projection) -> None:
        """See `Receiver`."""
        with self._lock:
            if (layer, role) in self._sigmas or layer in self.rejected:
                return
            parts = self.layers[layer]
            parts.projections[role] = projection.describe()
            parts.reasons.pop(role, None)
            parts.sharded |= projection.shard is not None
            # Beside queries that are split, the heads of a whole W_K that are used here may not be all.
            all_here = projection.is_whole and (projection.is_all or not parts.sharded)
            if all_here and self._reads_in_full(layer):
                self._sigmas[layer, role] = self._layer_sigmas.sigma(layer, role, projection.matrix())
            if projection.shard is None and (part := projection.part_of_parameter()) is not None:
                parts.weights[role] = part

    def retract(self, layer: str, role: Role) -> None:
        """See `Receiver`."""
        with self._lock:
            self._sigmas.pop((layer, role), None)
            self._layer_sigmas.forget(layer, role)
            parts = self.layers.get(layer)
            if parts is not None:
                parts.projections.pop(role, None)
                parts.weights.pop(role, None)

    def harvest(self) -> Harvest:
        """What was read since `begin`. Valid until the next `begin`."""
        readings = sorted(self._readings.values(), key=lambda r: self._order[r.layer, r.call])
        index = tuple(
            HeadIndex(r.layer, self.layers[r.layer].index, r.call, r.heads, r.attention, r.first_head)
            for r in readings
        )
        figures = [reading.figures() for reading in readings]
        device = figures[0].device
        layers = tuple(dict.fromkeys((i.layer, i.layer_index) for i in index))
        unknown = torch.full((), float("nan"), device=device)
        sigmas = torch.stack(
            [
                self._sigmas.get((layer, role), unknown).to(device, torch.float32)
                for layer, _ in layers
                for role in LAYER_FIGURES
            ]
        ).view(len(layers), len(LAYER_FIGURES))
        maps = {key: r.map for key, r in self._readings.items() if r.map is not None}
        return Harvest(
            self._step, index, torch.cat([f.to(device) for f in figures], dim=1), layers, sigmas, maps
        )

    def _read(self, call: AttentionCall) -> None:
        _require_values(call)
        self.expect([(call.layer, call.call)])
        parts = self.layers.get(call.layer)
        is_new = parts is None
        if parts is None:
            parts = self.layers[call.layer] = LayerParts.of(self._indices[call.layer], call)
        parts.ranks = call.ranks or parts.ranks
        parts.sharded |= call.sharded
        known = parts.projections
        parts.reasons.update({role: why for role, why in call.reasons.items() if role not in known})
        if call.query is not None:
            self.projection(call.layer, "query", call.query)
        if call.key is not None:
            self.projection(call.layer, "key", call.key)
        key = (call.layer, call.call)
        if key in self._broken:
            return
        is_first = key not in self._readings
        try:
            reading = self._readings.get(key) or CallReading(call)
            sigmas = self._head_sigmas.of(call) if self._reads_in_full(call.layer) else None
            reading.add(call, self._rows_of(call), sigmas)
        except Exception:
            # The rest of a step's rows would pass for all of them.
            self._broken.add(key)
            self._readings.pop(key, None)
            raise
        self._readings[key] = reading
        parts.calls = max(parts.calls, call.call + 1)
        parts.reading = reading.how
        self.rejected.pop(call.layer, None)
        # These come last: should one fail, the figures are there.
        if is_first and call.layer in self._suspects:
            reading.map = evidence_map(call)
        self._keep_full_map(call)
        if is_new:
            parts.visibility = sample(call)

    def _reads_in_full(self, layer: str) -> bool:
        return self._in_full or layer in self._suspects

    def _rows_of(self, call: AttentionCall) -> Tensor | None:
        batch, _, tokens = call.shape
        count = self.rows
        if count != "all" and self.adapt_to_batch:
            count = measures.rows_for(count, tokens, batch)
        device = call.rows.device
        # On accelerators all rows take one fused call, without largest logits; few rows need not.
        if count == "all" or (count >= tokens and device.type == "cpu"):
            return None
        key = (tokens, count, device)
        if key not in self._row_cache:
            self._row_cache[key] = measures.stratified_rows(tokens, count, self._step, device)
        return self._row_cache[key]

    def _keep_full_map(self, call: AttentionCall) -> None:
        heads = None if self._want_map is None else self._want_map(call.layer)
        if heads is None:
            return
        kept = self.full_maps.setdefault(call.layer, [])
        if call.call == 0:
            kept.clear()  # the maps of the latest forward
        kept.append(full_map(call, None if isinstance(heads, str) else heads))


def _require_values(call: AttentionCall) -> None:
    """Raise where tensors have shapes but no values."""
    for tensor in (call.rows,) if call.inputs is None else (call.rows, call.inputs.k):
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            kind = "on the meta device" if tensor.is_meta else "fake (FakeTensorMode)"
            raise UnreadError(
                f"its tensors are {kind}: they have shapes and no values, so that nothing can be measured. "
                "Give the model and its inputs on a real device"
            )

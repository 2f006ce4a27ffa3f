"""What was found in a model and what was not, as a table: `EntropyMonitor.describe`, `Capture.describe`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_ROLES = {"query": "W_Q", "key": "W_K", "value": "W_V", "output": "W_O"}
_GAP = "  "


@dataclass(frozen=True)
class LayerDescription:
    """One owner of attention: a row of the table.

    Attributes:
        layer: its qualified name.
        layer_index: place in order of execution.
        source: function that computes its attention.
        attention: how rows are normalised: `softmax`, `relu`, …
        heads: query heads.
        key_heads: heads of k; fewer where query heads share them, 0 where it could not be told.
        head_size: features of a head of q, 0 where it could not be told.
        calls: attention calls within one forward.
        mask: what its rows see, by its first measured call: `none`, `causal`, `window of 5 + padding`, …
        mode: `eager` or `compiled`.
        reading: which rows were read last, and how.
        projections: role to how the weight was identified.
        reasons: role to why the weight is not known.
        ranks: the processes that work on the same sequences with parts of its weights, or of others' near
            it; empty where each works on its own.
    """

    layer: str
    layer_index: int
    source: str
    attention: str
    heads: int
    key_heads: int
    head_size: int
    calls: int
    mask: str
    mode: str
    reading: str = ""
    projections: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    ranks: Sequence[int] = ()

    def row(self) -> dict[str, Any]:
        """The table's columns; of a projection that is not known, why."""
        left_out = ("projections", "reasons", "ranks")
        found = {name: value for name, value in vars(self).items() if name not in left_out}
        return found | {weight: self.weight(role) for role, weight in _ROLES.items()}

    def weight(self, role: str) -> str:
        """How the weight of a role was identified, or why it is not known."""
        if role in self.projections:
            return self.projections[role]
        return f"not known: {self.reasons.get(role) or 'no linear map was found that it comes from'}"


@dataclass(frozen=True)
class NotCovered:
    """A module whose attention is not measured, or not fully, and why."""

    module: str
    reason: str


@dataclass(frozen=True)
class Description:
    """What a monitor found in a model. Prints as a table.

    Attributes:
        model: the model's class.
        layers: what is measured, in order of execution; empty before the first measured forward.
        not_covered: what is not, and why.
        softmaxes: modules with a softmax that is taken for no attention, such as the choice of an expert.
        candidates: before the first measured forward, the modules that may compute attention.
        faults: how often each part of the reading failed.
        rows: query rows that a training's monitor plans to read of each sequence, or "all"; None of no
            training. What it reads, twice as many of a batch of one sequence, tells each layer's `reading`.
        every: steps between its measurements.
    """

    model: str
    layers: tuple[LayerDescription, ...]
    not_covered: tuple[NotCovered, ...] = ()
    softmaxes: tuple[NotCovered, ...] = ()
    candidates: tuple[str, ...] = ()
    faults: Mapping[str, int] = field(default_factory=dict)
    rows: int | str | None = None
    every: int | None = None

    @property
    def frame(self) -> pd.DataFrame:
        """A row per layer."""
        import pandas as pd

        return pd.DataFrame([layer.row() for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __repr__(self) -> str:
        return str(self)

    def _lines(self) -> Iterator[str]:
        if not self.layers:
            yield f"{self.model}: nothing has been measured yet."
            if self.candidates:
                yield "Modules that may compute attention, by their class, name or code:"
                yield from (f"{_GAP}{name}" for name in self.candidates)
        else:
            calls = sum(layer.calls for layer in self.layers)
            layers = _count(len(self.layers), "layer")
            yield f"{self.model}: measured are {_count(calls, 'attention call')} in {layers}."
            if self.every is not None:
                yield f"1 step in {self.every} is measured."
            yield from _table(self.layers)
        if self.not_covered:
            yield "Not covered:"
            yield from (f"{_GAP}{item.module}: {item.reason}" for item in self.not_covered)
        elif self.layers:
            yield "Nothing was found that is not covered."
        if self.softmaxes:
            yield "Taken for no attention (if one is, name its module in owners=[…]):"
            yield from (f"{_GAP}{item.module}: {item.reason}" for item in self.softmaxes)
        if self.faults:
            yield "Failed, see the log: " + ", ".join(f"{part} ({n})" for part, n in self.faults.items())


_COLUMNS: dict[str, Callable[[LayerDescription], str]] = {
    "layer": lambda d: d.layer,
    "source": lambda d: d.source,
    "attention": lambda d: d.attention,
    "heads": lambda d: str(d.heads) + (f" ({d.key_heads} key)" if d.key_heads not in (0, d.heads) else ""),
    "size": lambda d: str(d.head_size or "?"),
    "calls": lambda d: str(d.calls),
    "mask": lambda d: d.mask,
    "mode": lambda d: d.mode,
    "reading": lambda d: d.reading,
}


def _table(layers: Sequence[LayerDescription]) -> Iterator[str]:
    """A line per layer, and below it how its weights were identified."""
    rows = [list(_COLUMNS)] + [[cell(layer) for cell in _COLUMNS.values()] for layer in layers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [_GAP.join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    yield padded[0]
    before: dict[str, list[str]] = {}
    for layer, line in zip(layers, padded[1:], strict=True):
        yield line
        by_text: dict[str, list[str]] = {}
        for role, weight in _ROLES.items():
            by_text.setdefault(layer.weight(role), []).append(weight)
        if by_text == before:
            yield f"{_GAP * 2}weights: as above"
        else:
            yield from (f"{_GAP * 2}{', '.join(weights)}: {text}" for text, weights in by_text.items())
        before = by_text


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"

"""The tables that everything passes on: their columns, units and dtypes, in one place.

A measured training step is one `Record`. Its `heads` and `layers` are columnar: a dict from column name to
a one-dimensional numpy array (`float32`, `int64`) or, for text columns, a list of `str`; all columns of a
table have the same length. In a nullable column NaN means "not known" and is written as null; in a column
that is not nullable NaN is a reading (the attention itself was not finite).

Entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Columns: TypeAlias = dict[str, "Array | list[str]"]
DType = Literal["int64", "float32", "float64", "str"]
Merge = Literal["mean", "error", "sum", "max", "same"]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: the column's name, everywhere.
        dtype: its type on disk and in memory.
        doc: what it holds, with its unit.
        nullable: whether NaN in it means "not known".
        merge: for a figure, what the readings of several ranks come to: `mean` by the rows that each read,
            `error` of such a mean, `sum`, `max`, or `same` where all that know it agree. None for what says
            where a row belongs.
    """

    name: str
    dtype: DType
    doc: str
    nullable: bool = False
    merge: Merge | None = None


@dataclass(frozen=True)
class Table:
    """A named list of columns; `key` identifies a row within a run."""

    name: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The columns' names, in order."""
        return tuple(column.name for column in self.columns)

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"table {self.name!r} has no column {name!r}; it has {', '.join(self.names)}")

    def empty(self) -> Columns:
        """A table of no rows, with every column in its dtype."""
        return {c.name: [] if c.dtype == "str" else np.empty(0, dtype=c.dtype) for c in self.columns}


def _figure(name: str, merge: Merge, doc: str, *, nullable: bool = True) -> Column:
    return Column(name, "float32", doc, nullable, merge)


HEADS = Table(
    "heads",
    key=("step", "layer", "call", "head"),
    columns=(
        Column("step", "int64", "training step s: the forward before update s"),
        Column("layer", "str", "qualified name of the module that owns the attention"),
        Column("layer_index", "int64", "place of the layer in order of execution, from 0"),
        Column("call", "int64", "nth attention call of this layer within one forward, from 0"),
        Column("head", "int64", "query head, from 0"),
        Column("attention", "str", "how rows are normalised: softmax"),
        _figure(
            "entropy", "mean", "mean attention entropy of the rows read, nats, before dropout", nullable=False
        ),
        _figure("entropy_se", "error", "standard error of entropy from reading some rows only, nats"),
        Column("rows_read", "int64", "query rows read, all sequences: the weight in merges", merge="sum"),
        _figure("max_entropy", "mean", "mean of log n_i over the same rows, nats", nullable=False),
        _figure("max_logit", "max", "largest logit that the softmax sees"),
        _figure("floor_row", "mean", "B(norm of the centred logits of row i, n_i), mean, nats"),
        _figure("floor_activation", "mean", "B from the norms of q_i and K, mean, nats"),
        _figure("floor_weights", "mean", "B from sigma_qk and the inputs' norms, mean, nats"),
        _figure("floor_paper", "mean", "B(sigma_qk, n_i), mean, nats: the paper's curve, no floor"),
        _figure("sigma_q", "same", "spectral norm of this head's W_Q"),
        _figure("sigma_k", "same", "spectral norm of the W_K that this head uses"),
        _figure("sigma_qk", "same", "spectral norm of W_K W_Qᵀ of this head"),
    ),
)

LAYERS = Table(
    "layers",
    key=("step", "layer"),
    columns=(
        Column("step", "int64", "training step s: the forward before update s"),
        Column("layer", "str", "qualified name of the module that owns the attention"),
        Column("layer_index", "int64", "place of the layer in order of execution, from 0"),
        _figure("sigma_q", "same", "spectral norm of the whole W_Q"),
        _figure("sigma_k", "same", "spectral norm of the whole W_K"),
        _figure("sigma_v", "same", "spectral norm of the whole W_V"),
        _figure("sigma_o", "same", "spectral norm of the whole W_O"),
        _figure("grad_linf", "same", "largest absolute gradient of the attention weights"),
        _figure("grad_l2", "same", "Euclidean norm of the gradient of the attention weights"),
        _figure("update_sigma", "same", "larger spectral norm of the updates of W_Q and W_K"),
        _figure("update_entropy", "same", "spectral entropy of those updates, nats"),
    ),
)

SCALARS = Table(
    "scalars",
    key=("step", "name"),
    columns=(
        Column("step", "int64", "training step"),
        Column("name", "str", "what was given: loss, or a name of the user's"),
        Column("value", "float64", "its value", merge="mean"),
    ),
)

TABLES = (HEADS, LAYERS, SCALARS)

SHARE = "entropy_share"
"""Name of the derived figure entropy / max_entropy: 1 is uniform attention, 0 a single key."""

ABOVE_FLOOR = "above_floor"
"""Name of the derived figure entropy - floor_row, nats: how much sharper the head's logits let it be."""

LEVELLED: tuple[str, ...] = (
    *(column.name for column in HEADS.columns if column.dtype == "float32"),
    SHARE,
    ABOVE_FLOOR,
)
"""The figures of heads that `LEVELS` sums up."""


def _level(name: str) -> tuple[Column, ...]:
    merge: Merge = next((c.merge or "mean" for c in HEADS.columns if c.name == name), "mean")
    ends = (("", "mean"), ("_low", "least"), ("_high", "largest"))
    return tuple(_figure(name + end, merge, f"{what} {name} of the block") for end, what in ends)


LEVELS = Table(
    "levels",
    key=("step", "layer", "call", "head"),
    columns=(
        Column("step", "int64", "first step of a block of measured steps"),
        Column("until", "int64", "its last step"),
        Column("layer", "str", "qualified name of the module that owns the attention"),
        Column("layer_index", "int64", "place of the layer in order of execution, from 0"),
        Column("call", "int64", "nth attention call of this layer within one forward, from 0"),
        Column("head", "int64", "query head, from 0"),
        Column("measured", "int64", "measured steps in the block", merge="max"),
        Column("rows_read", "int64", "query rows read in all of them", merge="sum"),
        Column("broken", "int64", "readings of the entropy that were not finite", merge="sum"),
        *(column for name in LEVELLED for column in _level(name)),
    ),
)
"""Long runs made short enough to look at: each figure's mean, least and largest value over a block."""


@dataclass(frozen=True)
class Record:
    """What one measured step left: its rows of the tables, and all scalars since the last record."""

    step: int
    heads: Columns
    layers: Columns = field(default_factory=LAYERS.empty)
    scalars: Columns = field(default_factory=SCALARS.empty)


Severity = Literal["info", "warning", "severe"]
EventName = Literal["opened", "updated", "closed"]

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "severe")
"""Every severity, the mildest first."""


def severity_rank(severity: str) -> int:
    """The place of a severity in `SEVERITIES`; -1, below all, for one that another version wrote."""
    return SEVERITIES.index(severity) if severity in SEVERITIES else -1


@dataclass(frozen=True)
class Alert:
    """One event in the life of a run, from its first sign to its end.

    Attributes:
        id: stable while the alert lives; unique in the run together with `opened`.
        kind: which detector found it, such as `entropy_collapse`.
        severity: how bad it is.
        layer: qualified name of the layer; empty when it concerns the whole run.
        heads: the query heads concerned, ascending; grows while the alert is open.
        opened: step it was first measured at.
        updated: step of the latest change.
        closed: step it ended at, None while it is open.
        title: one line: what, where.
        message: what a person reads: which layer and heads, how far, since when, what drives it.
        advice: what to do about it.
        evidence: figures (float), and `map`, the worst head's attention map: rows of floats, at most 64 × 64.
    """

    id: str
    kind: str
    severity: Severity
    layer: str
    heads: tuple[int, ...]
    opened: int
    updated: int
    closed: int | None
    title: str
    message: str
    advice: str
    evidence: Mapping[str, Any]

    def __str__(self) -> str:
        return f"[{self.severity}] {self.title}\n  {self.message}\n  What to do: {self.advice}"


@dataclass(frozen=True)
class AlertEvent:
    """A change of an alert: it opened, was updated (grew, got worse) or closed."""

    event: EventName
    step: int
    alert: Alert


@dataclass(frozen=True)
class RunInfo:
    """What ran: handed to every logger before the first step, and kept as `run.json`.

    Attributes:
        model: class name, parameter names and shapes: `{"class": …, "parameters": {name: [..]}}`.
        options: the monitor's options as given and as resolved.
        versions: of Python, torch and this package.
        plan: per layer, what is measured and how (source, heads, projections).
        run_dir: where the run is kept, None when it is not.
        session: nth process start of this run, from 0.
        rank: of this process.
        launch: what tells this start of a distributed training from others, the same on all of its ranks;
            empty where nothing does.
    """

    model: Mapping[str, Any]
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    plan: Mapping[str, Any] = field(default_factory=dict)
    run_dir: str | None = None
    session: int = 0
    rank: int = 0
    launch: str = ""


class Sink:
    """Where records go: a TensorBoard or W&B logger, a file, a user's own. Override what you need.

    Called from one background thread, in order; what raises is reported once and switches this sink off, and
    training never sees it. Only `open` runs before training, on the caller's thread, and may raise.
    """

    def open(self, info: RunInfo) -> None:
        """Called once, before step 0. Raise here if the sink cannot work."""

    def log(self, record: Record) -> None:
        """Called with every measured step."""

    def alert(self, event: AlertEvent) -> None:
        """Called with every change of an alert, after the record of its step."""

    def flush(self) -> None:
        """Called when nothing has come for a second: write what is held back."""

    def close(self) -> None:
        """Called once, at the end."""

"""What figures and reports show, computed from a run's tables: pandas in, pandas out.

Units are those of `entropy_monitor.records`: entropies in nats, steps as integers. What is not
finite is left out of means and extremes, and `broken_steps` says where it was. What is not known
(null) is told apart from it: norms of weights are read in one of several measured steps only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import HEADS, LAYERS
from entropy_monitor.records import SHARE as SHARE  # beside what is made of it

MOST_LAYERS = 8
"""How many layers a figure shows unless it is told which: more lines cannot be told apart."""

MOST_POINTS = 1200
"""How many points of a line are drawn: more than a page has dots for."""

_SMOOTHED_FROM = 100
"""Values from which a loss is drawn with its running mean; fewer are readable as they are."""


class RunTables(Protocol):
    """What figures and reports read of a run; `entropy_monitor.load_run` returns one.

    The tables have the columns of `entropy_monitor.records`; `alerts` has one row per alert, the
    fields of `records.Alert`.
    """

    @property
    def name(self) -> str:
        """The run's name, for titles."""

    @property
    def path(self) -> Path:
        """The run's directory."""

    @property
    def heads(self) -> pd.DataFrame:
        """The `heads` table."""

    @property
    def layers(self) -> pd.DataFrame:
        """The `layers` table."""

    @property
    def scalars(self) -> pd.DataFrame:
        """The `scalars` table."""

    @property
    def alerts(self) -> pd.DataFrame:
        """One row per alert, in its last state."""

    @property
    def info(self) -> Any:
        """What ran: model, options, versions."""

    @property
    def plan(self) -> Any:
        """Per layer, what is measured and how."""

    @property
    def problems(self) -> Sequence[str]:
        """What could not be read, in words."""


def finite(values: pd.Series) -> pd.Series:
    """`values` in float64, with NaN for whatever is not finite or not a number."""
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    return numbers.where(np.isfinite(numbers))


def layer_names(table: pd.DataFrame) -> list[str]:
    """The layers of a table in order of execution."""
    if table.empty:
        return []
    order = table.drop_duplicates("layer")[["layer", "layer_index"]]
    return [str(name) for name in order.sort_values(["layer_index", "layer"])["layer"]]


def with_share(heads: pd.DataFrame) -> pd.DataFrame:
    """`heads` with `entropy_share`: null where rows see one key only and have none to lose."""
    maximum = finite(heads["max_entropy"])
    return heads.assign(**{SHARE: finite(heads["entropy"]) / maximum.where(maximum > 0)})


def column_of(run: RunTables, column: str) -> pd.DataFrame:
    """The key columns of the table that holds a numeric column, `heads` first, `value` and `known`.

    `value` is NaN where it is not finite or not known; `known` is False where it is null.

    Raises:
        ConfigurationError: no table has a numeric column of that name.
    """
    keys = {*HEADS.key, *LAYERS.key, "layer_index"}
    for spec, table in ((HEADS, run.heads), (LAYERS, run.layers)):
        numeric = {c.name for c in spec.columns if c.dtype != "str"} - keys
        if spec is HEADS and column == SHARE:
            return _valued(with_share(table), SHARE, nullable=False)
        if column in numeric:
            return _valued(table, column, nullable=spec[column].nullable)
    known = [c.name for s in (HEADS, LAYERS) for c in s.columns if c.dtype != "str"]
    names = ", ".join(dict.fromkeys([SHARE, *(name for name in known if name not in keys)]))
    raise ConfigurationError(f"column is {column!r}; a figure can show one of {names}")


def _valued(table: pd.DataFrame, column: str, *, nullable: bool) -> pd.DataFrame:
    kept = [c for c in ("step", "layer", "layer_index", "call", "head") if c in table.columns]
    known = table[column].notna() if nullable else True
    return table[kept].assign(value=finite(table[column]), known=known)


def choose_layers(
    table: pd.DataFrame,
    layers: Iterable[str] | None,
    *,
    most: int = MOST_LAYERS,
    low_is_bad: bool = True,
) -> tuple[list[str], str]:
    """Which layers to draw, and a note for the reader where that is not all of them.

    Args:
        table: a table with `step`, `layer`, `layer_index` and `value`.
        layers: names, or None for all; of more than `most`, evenly spaced ones, and of more than
            `MOST_LAYERS` the layer with the worst value too, so that what went wrong is in the picture.
        most: how many to choose.
        low_is_bad: whether the worst value is the lowest or the highest.

    Raises:
        ConfigurationError: a name is not a layer of the table.
    """
    known = layer_names(table)
    if layers is not None:
        wanted = [layers] if isinstance(layers, str) else list(layers)
        for name in wanted:
            if known and name not in known:
                raise ConfigurationError(f"layer is {name!r}; this run has {listed(known)}")
        return [name for name in wanted if name in known], ""
    if len(known) <= most:
        return known, ""
    places = np.linspace(0, len(known) - 1, most).round().astype(int).tolist()
    note = f"{most} of {len(known)} layers, evenly spaced"
    values = table["value"].to_numpy(dtype="float64")
    if most >= MOST_LAYERS and np.isfinite(values).any():
        at = int(np.nanargmin(values) if low_is_bad else np.nanargmax(values))
        worst = known.index(str(table["layer"].iloc[at]))
        if worst not in places:
            nearest = min(range(len(places)), key=lambda i: abs(places[i] - worst))
            places[nearest] = worst
            note += f", and the one with the {'lowest' if low_is_bad else 'highest'} value"
    return [known[i] for i in sorted(places)], note


def curves(table: pd.DataFrame, layers: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Per layer, by step: `mean`, `min` and `max` of `value` over heads and calls.

    Steps at which nothing of a layer is known are not there, nor are layers of which nothing ever is: a line
    through what is left joins one known point to the next.
    """
    chosen = table[table["layer"].isin(list(layers)) & table["known"]]
    if chosen.empty:
        return {}
    grouped = chosen.groupby(["layer", "step"], observed=True)["value"].agg(["mean", "min", "max"])
    parts = {str(name): part for name, part in grouped.groupby(level="layer", observed=True)}
    return {name: parts[name].droplevel("layer") for name in layers if name in parts}


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `column_of` with each `value` over the first of its own head that is known and positive."""
    heads = [c for c in ("layer", "call", "head") if c in table.columns]
    positive = table["value"].where(table["known"] & (table["value"] > 0))
    ordered = table.assign(positive=positive).sort_values("step", kind="stable")
    start = ordered.groupby(heads, observed=True)["positive"].transform("first").reindex(table.index)
    return table.assign(value=positive / start)


def thinned(*values: pd.Series, most: int = MOST_POINTS) -> npt.NDArray[np.int64]:
    """Places of the points that show lines over the same steps as all their points would.

    Of each stretch the lowest and the highest value of every line are kept, and where it breaks off.

    Args:
        *values: the lines, NaN where they are broken.
        most: about how many places to keep; shorter lines keep all.
    """
    length = len(values[0])
    if length <= most:
        return np.arange(length)
    stretches = max(1, most // (2 * len(values)))
    of = np.arange(length) * stretches // length
    kept = [np.array([0, length - 1])]
    for line in values:
        array = line.to_numpy(dtype="float64")
        there = np.isfinite(array)
        ordered = np.lexsort((array, of))
        ordered = ordered[there[ordered]]
        first = np.flatnonzero(np.diff(of[ordered], prepend=-1))
        kept += [ordered[first], ordered[np.append(first[1:], len(ordered)) - 1] if len(first) else first]
        gaps = np.flatnonzero(~there)
        kept.append(gaps[np.unique(of[gaps], return_index=True)[1]])
    return np.unique(np.concatenate(kept))


def largest_known(table: pd.DataFrame) -> pd.Series:
    """The largest `value` of all heads by step, of the steps at which all of them are known.

    Between the steps at which weights are read, those of layers under suspicion are read alone. A maximum
    over these would be one of other heads than at the steps before and after. A head that has never been
    known up to a step is not waited for.
    """
    heads = [c for c in ("layer", "call", "head") if c in table.columns]
    known_at = table.assign(known_at=table["step"].where(table["known"]))
    since = known_at.groupby(heads, observed=True)["known_at"].transform("min")
    lacking = table.loc[~table["known"] & (table["step"] > since), "step"]
    whole = table[table["known"] & ~table["step"].isin(lacking)]
    return whole.groupby("step")["value"].max()


def lowest_head(heads: pd.DataFrame) -> tuple[str, int, int] | None:
    """Layer, head and call of the lowest `entropy_share` ever read; of an unknown one the first head."""
    if heads.empty:
        return None
    share = with_share(heads)[SHARE].to_numpy(dtype="float64")
    row = heads.iloc[int(np.nanargmin(share)) if np.isfinite(share).any() else 0]
    return str(row["layer"]), int(row["head"]), int(row["call"])


def head_series(heads: pd.DataFrame, layer: str, head: int, call: int) -> pd.DataFrame:
    """The rows of one query head, indexed by step.

    Raises:
        ConfigurationError: the table has rows, and none of that layer, head and call.
    """
    rows = heads[(heads["layer"] == layer) & (heads["head"] == head) & (heads["call"] == call)]
    if rows.empty and not heads.empty:
        known = layer_names(heads)
        if layer not in known:
            raise ConfigurationError(f"layer is {layer!r}; this run has {listed(known)}")
        pairs = heads.loc[heads["layer"] == layer, ["head", "call"]].drop_duplicates()
        raise ConfigurationError(
            f"layer {layer!r} has no head {head} in call {call}; it has heads "
            f"{_span(pairs['head'])} in calls {_span(pairs['call'])}"
        )
    return rows.set_index("step").sort_index()


def scalar(run: RunTables, name: str = "loss") -> pd.Series:
    """One scalar by step, as recorded: what is not finite is kept; of one step's values the last."""
    rows = run.scalars[run.scalars["name"] == name]
    steps = pd.Index(rows["step"].to_numpy(dtype="int64"), name="step")
    series = pd.Series(rows["value"].to_numpy(dtype="float64"), index=steps, name=name)
    return series[~series.index.duplicated(keep="last")].sort_index()


def smooth(series: pd.Series) -> tuple[pd.Series, int]:
    """A centred running mean over about 2 % of the values, and its window: 1 is the series."""
    if len(series) < _SMOOTHED_FROM:
        return finite(series), 1
    window = max(3, len(series) // 50) | 1
    values = finite(series)
    mean = values.rolling(window, center=True, min_periods=1).mean()
    return mean.where(values.notna()), window


def broken_steps(table: pd.DataFrame, column: str) -> list[int]:
    """Steps at which a column that is never null held NaN or infinity."""
    if table.empty:
        return []
    values = pd.to_numeric(table[column], errors="coerce").astype("float64")
    return sorted({int(step) for step in table.loc[~np.isfinite(values), "step"]})


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence, cut after a few."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _span(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"

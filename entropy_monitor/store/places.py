"""What of a model a row is of, and the orders in which rows of a record stand."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, order=True)
class Place:
    """A head of one call of a layer; of a whole layer, call is 0 and head -1."""

    layer: str
    call: int
    head: int


@dataclass(frozen=True)
class Order:
    """What the rows of a record are of, one after another.

    Attributes:
        places: of each row.
        indices: of each row, its layer's place in the order of execution.
    """

    places: tuple[Place, ...]
    indices: tuple[int, ...]

    @staticmethod
    def of(rows: pa.Table) -> Order:
        """The order of a record's rows, given the columns of `contents.place_columns`."""
        count = rows.num_rows
        names = rows.schema.names
        layers = rows.column("layer").to_pylist()
        calls = rows.column("call").to_pylist() if "call" in names else [0] * count
        heads = rows.column("head").to_pylist() if "head" in names else [-1] * count
        places = tuple(Place(*place) for place in zip(layers, calls, heads, strict=True))
        return Order(places, tuple(rows.column("layer_index").to_pylist()))

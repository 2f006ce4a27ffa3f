"""Answers as bytes: plain JSON values, and numpy arrays as they lie in memory.

A packed answer is a little-endian uint32 n, n bytes of JSON, zeros up to a multiple of 8, and a blob. In the
JSON an array stands as `{"$array": [dtype, shape, offset, bytes]}`, its place counted from the blob's start.
JSON has no NaN, and a run of ten million readings as decimal text would be five times as large.
`static/packing.js` reads the same form.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_DTYPES = {"f4": "<f4", "f8": "<f8", "i4": "<i4", "u1": "u1", "u2": "<u2"}
_STEPS = 65534
"""Codes of a quantised array from its lowest to its highest value; the next one stands for NaN."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Quantised:
    """An array that is packed in 16 bits a value: from its lowest to its highest finite value in even steps.

    Attributes:
        values: any shape, floats; what is not finite becomes NaN.
        log: whether steps are even in the logarithm; what is not above 0 becomes NaN.
    """

    values: Array
    log: bool = False


def pack(value: Any) -> bytes:
    """Packs dicts, lists, texts, numbers, None, arrays and `Quantised` arrays.

    Arrays of float32, float64, int32, uint8 and bool keep their dtype; int64 becomes float64, exact
    up to 2⁵³. Keys become texts; one that is `$array` becomes `$$array`.

    Raises:
        TypeError: something else is in it.
        ValueError: a number outside of an array is not finite.
    """
    blob = bytearray()
    header = json.dumps(_plain(value, blob), allow_nan=False, separators=(",", ":")).encode()
    padding = bytes(-(4 + len(header)) % 8)
    return b"".join([len(header).to_bytes(4, "little"), header, padding, bytes(blob)])


def unpack(data: bytes) -> Any:
    """What `pack` was given; quantised arrays as float32 of their 65,535 levels.

    Raises:
        ValueError: this is nothing that `pack` made.
    """
    length = int.from_bytes(data[:4], "little")
    start = 4 + length + -(4 + length) % 8
    if len(data) < start:
        raise ValueError(f"{len(data)} bytes are no packed answer: its header has {length}")
    return _restored(json.loads(data[4 : 4 + length]), memoryview(data)[start:])


def _plain(value: Any, blob: bytearray) -> Any:
    if isinstance(value, Quantised):
        return _quantised(value, blob)
    if isinstance(value, np.ndarray):
        if value.dtype == np.uint16:  # which stands for a quantised one
            raise TypeError("an array of uint16 cannot be packed")
        return {"$array": _placed(value, blob)}
    if isinstance(value, dict):
        return {_key(key): _plain(inner, blob) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, blob) for inner in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} stands outside of an array; give None for what is not known")
        return value
    raise TypeError(f"{type(value).__name__} cannot be packed")


def _key(key: Any) -> str:
    text = str(key)
    return "$$array" if text == "$array" else text


def _placed(values: Array, blob: bytearray) -> list[Any]:
    kind = f"{values.dtype.kind}{values.dtype.itemsize}"
    if kind not in ("i4", "u2"):
        kind = {"b": "u1", "i": "f8"}.get(values.dtype.kind, kind)
    if kind not in _DTYPES:
        raise TypeError(f"an array of {values.dtype} cannot be packed")
    data = np.ascontiguousarray(values, dtype=_DTYPES[kind]).tobytes()
    blob += bytes(-len(blob) % 8)
    offset = len(blob)
    blob += data
    return [kind, list(values.shape), offset, len(data)]


def _quantised(given: Quantised, blob: bytearray) -> dict[str, Any]:
    values = given.values.astype(np.float64)
    if given.log:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.log10(values)
    known = np.isfinite(values)
    low, high = (float(values[known].min()), float(values[known].max())) if known.any() else (0.0, 0.0)
    codes = np.full(values.shape, _STEPS + 1, dtype=np.uint16)
    span = high - low if high > low else 1.0
    codes[known] = np.rint((values[known] - low) / span * _STEPS).astype(np.uint16)
    return {"$array": _placed(codes, blob), "low": low, "high": high, "log": given.log}


def _restored(value: Any, blob: memoryview) -> Any:
    if isinstance(value, list):
        return [_restored(inner, blob) for inner in value]
    if not isinstance(value, dict):
        return value
    if "$array" not in value:
        return {key: _restored(inner, blob) for key, inner in value.items()}
    kind, shape, offset, size = value["$array"]
    array = np.frombuffer(blob[offset : offset + size], dtype=_DTYPES[kind]).reshape(shape)
    if kind != "u2":
        return array
    numbers = value["low"] + array.astype(np.float64) / _STEPS * (value["high"] - value["low"])
    numbers = np.where(array > _STEPS, np.nan, numbers)
    restored: Array = (10.0**numbers if value["log"] else numbers).astype(np.float32)
    return restored

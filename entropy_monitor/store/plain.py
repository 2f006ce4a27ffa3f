"""Any value as strict JSON and back. JSON has no NaN and no infinity: here they are `{"$float": "nan"}`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_FLOAT = "$float"


def to_json(value: object, *, indent: int | None = None) -> str:
    """Strict JSON, keys in the order given. What JSON cannot say becomes its `str`."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(
        _plain(value), ensure_ascii=False, allow_nan=False, indent=indent, separators=separators
    )


def from_json(text: str) -> Any:
    """The value that `to_json` wrote; tuples come back as lists.

    Raises:
        ValueError: `text` is not JSON.
    """
    try:
        return json.loads(text, object_hook=_restore)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _plain(value: object) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    return str(value)


def _restore(value: dict[str, Any]) -> Any:
    if value.keys() == {_FLOAT}:
        return float(value[_FLOAT])
    return value

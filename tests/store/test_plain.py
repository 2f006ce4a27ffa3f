from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from entropy_monitor.store.plain import from_json, to_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def same(left: object, right: object) -> bool:
    return repr(left) == repr(right)  # tells nan, -0.0, 1 and True apart


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_values_come_back_and_the_text_is_strict_json(value: object) -> None:
    text = to_json(value)
    assert same(from_json(text), value)
    json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))


def test_what_json_does_not_know_becomes_plain() -> None:
    value = {
        1: (np.float32(0.5), np.int64(2)),
        "array": np.array([1.0, np.nan]),
        "path": Path("a/b"),
        "set": {3, 1},
        "type": np.dtype("int8"),
    }
    found = from_json(to_json(value))
    assert found["1"] == [0.5, 2]
    assert found["array"][0] == 1.0
    assert math.isnan(found["array"][1])
    assert (found["path"], found["set"], found["type"]) == ("a/b", [1, 3], "int8")

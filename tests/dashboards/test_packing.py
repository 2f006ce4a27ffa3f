from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from entropy_monitor.dashboards.packing import Quantised, pack, unpack


def parts(data: bytes):
    """The header as text, and the blob."""
    length = int.from_bytes(data[:4], "little")
    start = -(-(4 + length) // 8) * 8
    return data[4 : 4 + length].decode(), data[start:]


def places(value):
    """Every array's [dtype, shape, offset, bytes] in a header."""
    if isinstance(value, dict) and "$array" in value:
        return [value["$array"]]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [place for each in inner for place in places(each)]


ARRAYS = [
    np.array([1.5, np.nan, np.inf, -np.inf, -0.0], np.float32),
    np.array([[1e300, np.nan], [5e-324, -1.0]]),
    np.array([-(2**31), 2**31 - 1], np.int32),
    np.array([0, 255], np.uint8),
    np.empty((0, 3), np.float32),
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.arange(10, dtype=np.float64)[::3],
    np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    np.array(7.0),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_come_back_as_they_were(array):
    found = unpack(pack({"a": array, "b": [array, {"c": array}]}))
    for copy in (found["a"], found["b"][0], found["b"][1]["c"]):
        assert (copy.dtype, copy.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(copy, array)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (np.array([True, False]), np.uint8),
        (np.array([2**53, -(2**53)]), np.float64),
        (np.array([-5, 3], np.int16), np.float64),
        (np.array([1.5, -2], ">f4"), np.float32),
        (np.array([1, -2], ">i4"), np.int32),
    ],
)
def test_arrays_of_other_types(given, dtype):
    found = unpack(pack(given))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, given)


def test_plain_values_stand_as_they_are():
    value = {"text": "ü\n</script>\u2028\ud800", "n": 3, "x": -0.5, "yes": True, "no": None, "l": [1, [], {}]}
    assert unpack(pack(value)) == value
    assert unpack(pack({1: ("a", "b")})) == {"1": ["a", "b"]}
    assert json.loads(parts(pack(value))[0]) == value


@pytest.mark.parametrize("padding", range(9))
def test_the_blob_and_every_array_begin_at_a_multiple_of_eight(padding):
    small = np.array([1, 2, 3], np.uint8)
    data = pack({"x" * padding: [small, small, np.arange(3.0), Quantised(np.arange(5.0)), small]})
    header, blob = parts(data)
    assert (len(data) - len(blob)) % 8 == 0
    found = places(json.loads(header))
    assert len(found) == 5
    assert all(offset % 8 == 0 and offset + size <= len(blob) for _, _, offset, size in found)
    ends = sorted((offset, offset + size) for _, _, offset, size in found)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))


def test_the_header_is_json_without_nan():
    values = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    header, _ = parts(pack({"a": values, "q": Quantised(values), "e": Quantised(values[:3])}))

    def refuse(word):
        raise AssertionError(word)

    json.loads(header, parse_constant=refuse)
    for bad in (math.nan, math.inf, -math.inf, np.float64("nan")):
        with pytest.raises(ValueError, match="give None for what is not known"):
            pack({"a": [bad]})


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {"a": {1, 2}},
        [np.float32(1)],
        np.array(["a"]),
        np.array([1], np.uint16),
        np.array([1], np.uint64),
        np.array([1j]),
        np.array([1], np.float16),
        np.array(["2020"], "datetime64[D]"),
        b"bytes",
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_packed(value):
    with pytest.raises(TypeError, match="cannot be packed"):
        pack(value)


def test_a_key_that_means_an_array_is_another_one():
    assert unpack(pack({"$array": ["f4", [1], 0, 4]})) == {"$$array": ["f4", [1], 0, 4]}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("log", [False, True])
def test_a_quantised_value_is_off_by_half_a_level_at_most(seed, log):
    g = np.random.default_rng(seed)
    values = 10 ** g.uniform(-3, 4, (50, 7)) if log else g.uniform(-5, 11, (50, 7))
    values[g.random(values.shape) < 0.2] = np.nan
    values[0, 0] = np.inf
    if log:
        values[0, 1:3] = 0, -1
    found = unpack(pack(Quantised(values.astype(np.float32), log=log)))
    assert (found.dtype, found.shape) == (np.float32, values.shape)
    fit = np.isfinite(values) & ((values > 0) | (not log))
    np.testing.assert_array_equal(np.isnan(found), ~fit)
    exact, near = (np.log10(v[fit]) if log else v[fit] for v in (values, found.astype(np.float64)))
    level = (exact.max() - exact.min()) / 65534
    assert np.abs(near - exact).max() <= 0.51 * level + 1e-6 * np.abs(exact).max()
    assert near.max() == pytest.approx(exact.max(), rel=1e-6)
    assert near.min() == pytest.approx(exact.min(), rel=1e-6)


@pytest.mark.parametrize(
    "values",
    [[], [3.25], [3.25] * 4, [np.nan, np.nan], [2.0, np.nan, 2.0], [1e-310, 2e-310], [-3e38, 3e38]],
)
@pytest.mark.parametrize("log", [False, True])
def test_quantised_arrays_that_are_short_or_even_or_extreme(values, log):
    given = np.array(values)
    if log:
        given = np.abs(given)
    with np.errstate(over="ignore"):
        found = unpack(pack(Quantised(given, log=log)))
        expected = given.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_quantised_values_take_two_bytes():
    _, blob = parts(pack(Quantised(np.zeros((10, 10)))))
    assert len(blob) == 200


@pytest.mark.parametrize("data", [b"", b"\x05\0\0\0", b"\xff\xff\xff\xff{}", b"\x02\0\0\0nn\0\0"])
def test_what_is_no_packed_answer(data):
    with pytest.raises(ValueError, match=r"."):
        unpack(data)

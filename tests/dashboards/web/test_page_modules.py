"""What the page reads and writes as Python does, in a real browser."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from entropy_monitor import phrases
from entropy_monitor.dashboards.packing import Quantised, pack, unpack
from tests.dashboards.web.browser import Page
from tests.dashboards.web.conftest import Served

pytestmark = pytest.mark.xdist_group("chromium")

UNPACKED = """
const plain = (v) => {
    const orNull = (x) => (Number.isNaN(x) ? null : x);
    if (ArrayBuffer.isView(v)) return { shape: v.shape, values: Array.from(v, orNull) };
    if (Array.isArray(v)) return v.map(plain);
    if (!v || typeof v !== "object") return v;
    return Object.fromEntries(Object.entries(v).map(([key, value]) => [key, plain(value)]));
};
return plain(module.unpack(Uint8Array.from(atob(given), (c) => c.charCodeAt(0)).buffer));
"""
WORDS = """
return {
    number: given.map(module.number),
    percent: given.slice(0, 7).map(module.percent),
    times: given.slice(1, 8).map(module.times),
    ranges: [[], [3], [0, 1], [0, 1, 2, 7]].map(module.ranges),
};
"""


def ask(page: Page, module: str, script: str, given: Any) -> Any:
    """What a script returns that uses one of the page's modules."""
    wrapped = """
        const [address, given, done] = arguments;
        import(address).then((module) => done((() => {SCRIPT})())).catch((error) => done(String(error)));
    """
    return page.driver.execute_async_script(wrapped.replace("SCRIPT", script), module, given)


def test_the_page_reads_what_python_packs(page: Page, runs: Served) -> None:
    value = {
        "text": "σ “quoted” 字",
        "none": None,
        "list": [1, 2.5, True, {"inner": []}],
        "f4": np.array([[1.5, -2], [0, 3e38]], np.float32),
        "f8": np.array([0.1, 2**52]),
        "i4": np.array([[-1], [7]], np.int32),
        "u1": np.array([True, False]),
        "empty": np.empty((0, 3), np.float32),
        "even": Quantised(np.array([0.0, np.nan, 1.0, 0.25])),
        "log": Quantised(np.array([1e-3, 1e4, np.nan, 2.0]), log=True),
    }
    packed = pack(value)
    page.open(runs.address)
    answer = ask(page, f"{runs.address}static/packing.js", UNPACKED, base64.b64encode(packed).decode())
    for name, expected in unpack(packed).items():
        if isinstance(expected, np.ndarray):
            assert answer[name]["shape"] == list(expected.shape), name
            numbers = np.array([np.nan if v is None else v for v in answer[name]["values"]], dtype=float)
            np.testing.assert_allclose(numbers, expected.astype(float).ravel(), rtol=1e-6, err_msg=name)
        else:
            assert answer[name] == expected


def test_figures_read_as_they_do_elsewhere(page: Page, runs: Served) -> None:
    values = [
        0,
        1,
        0.5,
        1.005,
        12.346,
        99.96,
        100,
        1234.6,
        999999,
        1e6,
        2.5e-4,
        1e-3,
        -3.14159,
        5436.85,
        0.0999,
    ]
    page.open(runs.address)
    answer = ask(page, f"{runs.address}static/words.js", WORDS, values)
    assert answer["number"] == [phrases.number(v).replace("e+0", "e").replace("e-0", "e-") for v in values]
    assert answer["percent"] == [phrases.percent(value) for value in values[:7]]
    assert answer["times"] == [phrases.times(value) for value in values[1:8]]
    assert answer["ranges"] == ["", "3", "0, 1", "0–2, 7"]

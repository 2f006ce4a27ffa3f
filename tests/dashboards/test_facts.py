from __future__ import annotations

import pytest

from entropy_monitor.dashboards.facts import fact_rows, plan_rows


def test_what_ran():
    info = {
        "format": 1,
        "created": "2025-01-01T00:00:00",
        "model": {"class": "ViT", "parameters": {"w": [4, 4], "b": [4]}},
        "options": {"every": 10, "rows": None, "layers": ["a", "b"], "nested": {"x": 1.5, "y": True}},
        "versions": {"torch": "2.4"},
        "empty": "",
        "nothing": {},
    }
    assert fact_rows(info) == [
        ("format", "1"),
        ("created", "2025-01-01T00:00:00"),
        ("model", "class: ViT, parameters: 2"),
        ("options", "every: 10, rows: –, layers: a b, nested: x: 1.5, y: True"),
        ("versions", "torch: 2.4"),
    ]


def test_how_it_was_measured():
    plan = {"blocks.0.attn": {"source": "sdpa", "heads": 4, "ranks": [0, 1]}, "blocks.1.attn": "not read"}
    assert plan_rows(plan) == [
        ("blocks.0.attn", "source: sdpa, heads: 4, ranks: 0 1"),
        ("blocks.1.attn", "not read"),
    ]
    assert plan_rows({}) == fact_rows({}) == []


@pytest.mark.parametrize(
    "value", [None, 3, "<script>", [], [None, [1]], {"parameters": 5}, {"parameters": None}]
)
def test_what_another_version_wrote(value):
    for rows in (fact_rows({"x": value}), plan_rows({"x": value})):
        assert all(isinstance(key, str) and isinstance(text, str) for key, text in rows)

from __future__ import annotations

import pytest

from entropy_monitor.dashboards.shown_columns import HEAD_COLUMNS, LAYER_COLUMNS
from entropy_monitor.records import ABOVE_FLOOR, HEADS, LAYERS, LEVELLED, SHARE

BOTH = [*HEAD_COLUMNS, *LAYER_COLUMNS]


def figures(table):
    return {column.name for column in table.columns if column.dtype == "float32"}


def test_every_figure_of_heads_and_layers_is_there_once():
    names = [column.name for column in HEAD_COLUMNS]
    assert set(names) == figures(HEADS) | {SHARE, ABOVE_FLOOR} == set(LEVELLED)
    assert len(names) == len(set(names))
    names = [column.name for column in LAYER_COLUMNS]
    assert set(names) == figures(LAYERS)
    assert len(names) == len(set(names))


def test_the_menu_begins_with_what_tells_most():
    assert [c.name for c in HEAD_COLUMNS[:4]] == [SHARE, ABOVE_FLOOR, "sigma_qk", "max_logit"]


@pytest.mark.parametrize("column", BOTH, ids=lambda c: c.name)
def test_labels_units_and_texts(column):
    assert column.label
    assert len(column.label) <= 36
    assert column.text.endswith(".")
    assert column.scale in ("share", "linear", "log")
    assert column.bad in ("low", "high")
    table = HEADS if column in HEAD_COLUMNS else LAYERS
    if column.name in table.names:
        assert (column.unit == "nats") == ("nats" in table[column.name].doc)


def test_labels_tell_columns_apart():
    for columns in (HEAD_COLUMNS, LAYER_COLUMNS):
        assert len({column.label for column in columns}) == len(columns)


def test_what_is_of_any_sign_or_zero_has_no_logarithmic_axis():
    positive = ("sigma_", "grad_", "update_sigma")  # norms
    for column in BOTH:
        assert (column.scale == "log") == column.name.startswith(positive)
        assert (column.scale == "share") == (column.name == SHARE)

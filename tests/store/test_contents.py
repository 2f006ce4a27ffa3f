from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from entropy_monitor.records import HEADS, LAYERS, LEVELS, SCALARS
from entropy_monitor.store.codec import batch_message, to_batch
from entropy_monitor.store.contents import Contents, note_of, place_columns, read_note
from entropy_monitor.store.framing import PREFIX, metadata_length
from tests.store.samples import NAMES, columns

ODD = ("", "a,b", "a\nb", "steps=1,2 EMHOLDS rows=9 order=00000000 steps=7", "ü注意", "z" * 5000)


def batch(step, table=HEADS, **changes):
    return to_batch(table, columns(table, step, **changes))


def head_of(message):
    return message[: PREFIX + metadata_length(message[:PREFIX])]


def test_places_are_what_identifies_a_row_within_a_step() -> None:
    assert place_columns(HEADS) == place_columns(LEVELS) == ("layer", "call", "head", "layer_index")
    assert place_columns(LAYERS) == ("layer", "layer_index")


@pytest.mark.parametrize("table", [HEADS, LAYERS], ids=lambda t: t.name)
@pytest.mark.parametrize("steps", [(7,), (-3, 0, 12), (5, 5, 4), (2**62, -(2**62))])
def test_a_note_says_what_a_message_holds(table, steps):
    batches = [batch(step, table) for step in steps]
    found = read_note(head_of(batch_message(batches, 1, note_of(table, batches))))
    assert found is not None
    assert (found.rows, found.steps) == (batches[0].num_rows, steps)


def test_equal_orders_have_equal_fingerprints_and_others_have_not():
    def order(**changes):
        return read_note(note_of(HEADS, [batch(3, **changes)]).encode()).order

    shuffled = batch(3).take(pa.array([1, 0, 2, 3]))
    other_calls = columns(HEADS, 3) | {"call": np.arange(4)}
    orders = [
        order(),
        order(layers=NAMES[::-1]),
        order(layers=NAMES[:1]),
        order(heads=3),
        order(layers=("ab", "c")),
        order(layers=("a", "bc")),
        *(order(layers=(name, "x")) for name in ODD),
        read_note(note_of(HEADS, [shuffled]).encode()).order,
        read_note(note_of(HEADS, [to_batch(HEADS, other_calls)]).encode()).order,
    ]
    assert len(set(orders)) == len(orders)
    assert order() == order(shift=1.0) == read_note(note_of(HEADS, [batch(9)]).encode()).order


def test_a_batch_that_is_a_piece_of_another_has_its_own_order():
    whole = pa.Table.from_batches([batch(1), batch(2, layers=NAMES[::-1])]).combine_chunks().to_batches()[0]
    for first, alone in ((0, batch(1)), (4, batch(2, layers=NAMES[::-1]))):
        piece = whole.slice(first, 4)
        assert note_of(HEADS, [piece]) == note_of(HEADS, [alone])


def test_what_is_no_row_of_whole_records_has_no_note():
    two_steps = columns(HEADS, 1) | {"step": np.array([1, 1, 2, 2])}
    assert note_of(HEADS, [to_batch(HEADS, two_steps)]) == ""
    assert note_of(HEADS, [batch(1), batch(2, layers=NAMES[::-1])]) == ""
    assert note_of(HEADS, [batch(1), batch(2, heads=3)]) == ""
    assert note_of(HEADS, []) == ""
    scalars = {"step": np.array([1]), "name": ["loss"], "value": np.array([1.0])}
    assert note_of(SCALARS, [to_batch(SCALARS, scalars)]) == ""


@pytest.mark.parametrize("name", ODD)
def test_names_cannot_pass_for_a_note(name):
    batches = [batch(4, layers=(name, "x"))]
    noted = read_note(head_of(batch_message(batches, 1, note_of(HEADS, batches))))
    assert noted.steps == (4,)
    assert read_note(head_of(batch_message(batches, 1))) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "EMHOLDS",
        "EMHOLDS rows= order=00000000 steps=1",
        "EMHOLDS rows=1 order=0000000 steps=1",
        "EMHOLDS rows=1 order=00000000 steps=",
        "EMHOLDS rows=1 order=00000000 steps=99999999999999999999",
        "EMHOLDS rows=99999999999999999999 order=00000000 steps=1",
        "EMHOLDS rows=1 order=00000000 steps=1," + "9" * 5000,
    ],
)
def test_what_is_no_note(text):
    assert read_note(text.encode()) is None


def test_what_follows_the_last_step_is_left_out():
    assert read_note(b"xEMHOLDS rows=2 order=0000000f steps=-1,2,x") == Contents(2, 15, (-1, 2))

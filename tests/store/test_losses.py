from __future__ import annotations

import pytest

from entropy_monitor.store.losses import Losses


def words(*told):
    """What is said after these were told, in the form (method, arguments…)."""
    losses = Losses("heads-000-000.arrows")
    for method, *arguments in told:
        getattr(losses, method)(*arguments)
    return [text.removeprefix("heads-000-000.arrows: ") for text in losses.in_words]


SOUND = [("message", n) for n in range(4)]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([], []),
        (SOUND, []),
        ([("message", 0), ("gap", 70), ("message", 2)], ["batch 1 damaged (70 bytes): not read"]),
        ([("message", 0), ("gap", 70), ("message", 4)], ["batches 1 to 3 damaged (70 bytes): not read"]),
        ([("message", 0), ("message", 2)], ["batch 1 damaged: not read"]),
        ([("gap", 9), ("message", 1)], ["the schema damaged (9 bytes): not read"]),
        ([("message", 3)], ["the schema and batches 1 to 2 damaged: not read"]),
        ([("gap", 5), *SOUND], ["5 damaged bytes before the schema: no batch is missing"]),
        (
            [("message", 0), ("gap", 5), ("message", 1), ("message", 2)],
            ["5 damaged bytes before batch 1: no batch is missing"],
        ),
        ([*SOUND, ("damaged", 2, 99)], ["batch 2 damaged (99 bytes): not read"]),
        ([*SOUND, ("undecodable", 1, 1, "why")], ["batch 1 cannot be decoded: why"]),
        ([*SOUND, ("undecodable", 1, 3, "why")], ["batches 1 to 3 cannot be decoded: why"]),
        ([*SOUND, ("tail", "open", 0)], []),
        ([*SOUND, ("tail", "closed", 8)], []),
        ([*SOUND, ("tail", "damaged", 7)], ["7 damaged bytes after batch 3: not read"]),
        (
            [*SOUND, ("tail", "torn", 7)],
            ["7 bytes after batch 3 are no whole batch: still being written, or cut short"],
        ),
        ([("tail", "damaged", 7)], ["7 damaged bytes from the start: not read"]),
        ([("message", 0), ("tail", "damaged", 7)], ["7 damaged bytes after the schema: not read"]),
    ],
)
def test_losses_in_words(told, said):
    assert words(*told) == said


def test_a_tail_is_what_it_was_last_and_damage_stays():
    told = [
        ("message", 0),
        ("gap", 3),
        ("message", 2),
        ("tail", "torn", 5),
        ("message", 3),
        ("tail", "open", 0),
    ]
    assert words(*told) == ["batch 1 damaged (3 bytes): not read"]
    assert words(*told, ("tail", "damaged", 2))[1:] == ["2 damaged bytes after batch 3: not read"]


def test_a_gap_is_told_once():
    assert len(words(("message", 0), ("gap", 3), ("message", 1), ("message", 2), ("message", 3))) == 1


def test_each_text_names_the_file():
    losses = Losses("layers-001-002.arrows")
    losses.message(2)
    losses.tail("torn", 4)
    assert all(text.startswith("layers-001-002.arrows: ") for text in losses.in_words)
    assert len(losses.in_words) == 2

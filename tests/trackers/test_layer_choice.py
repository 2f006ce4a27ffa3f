from __future__ import annotations

import itertools

import pytest

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.trackers.aggregates import LayerAggregate
from entropy_monitor.trackers.layer_choice import LayerChoice


def layers(*numbers: int, call: int = 0) -> list[LayerAggregate]:
    return [LayerAggregate(f"blocks.{n}", n, call, 4, {"entropy_min": 1.0}) for n in numbers]


def chosen(choice: LayerChoice, given: list[LayerAggregate]) -> list[int]:
    return [layer.index for layer in choice.choose(given)]


def test_few_layers_are_all_shown() -> None:
    assert chosen(LayerChoice(4), layers(0, 1, 2, 3)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("most", "total"), [(48, 49), (48, 400), (2, 5), (7, 1000)])
def test_of_many_the_first_the_last_and_evenly_spaced_ones_are(most: int, total: int) -> None:
    found = chosen(LayerChoice(most), layers(*range(total)))
    assert len(found) == most
    assert (found[0], found[-1]) == (0, total - 1)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert max(gaps) - min(gaps) <= 1


def test_layers_with_an_alert_join_and_stay() -> None:
    choice = LayerChoice(3)
    assert chosen(choice, layers(*range(9))) == [0, 4, 8]
    choice.alert("blocks.5")
    choice.alert("blocks.4")
    choice.alert("")  # of the whole run
    assert chosen(choice, layers(*range(9))) == [0, 4, 5, 8]
    assert chosen(choice, layers(0, 5)) == [0, 5]


def test_as_many_join_as_there_were() -> None:
    choice = LayerChoice(3)
    for n in range(100):
        choice.alert(f"blocks.{n}")
    assert chosen(choice, layers(*range(100))) == [0, 1, 2, 3, 50, 99]


def test_a_choice_stays_when_layers_come_late() -> None:
    choice = LayerChoice(4)
    assert chosen(choice, layers(0, 1, 2)) == [0, 1, 2]
    late = layers(*range(40))
    assert chosen(choice, late) == chosen(choice, late) == [0, 1, 2, 3]


def test_each_call_counts() -> None:
    choice = LayerChoice(2)
    calls = [layers(0, call=n)[0] for n in range(9)]
    assert [layer.call for layer in choice.choose(calls)] == [0, 8]


def test_none_may_be_wanted() -> None:
    choice = LayerChoice(0)
    choice.alert("blocks.0")
    assert chosen(choice, layers(0, 1)) == []


@pytest.mark.parametrize("most", [-1, 2.5, True, None])
def test_refuses_what_is_no_number_of_layers(most: object) -> None:
    with pytest.raises(ConfigurationError, match=f"max_layers is {most!r}; give a whole number"):
        LayerChoice(most)  # type: ignore[arg-type]

from __future__ import annotations

import itertools

import pytest

from entropy_monitor.schedule import Schedule


def measured(every: int, numbers: list[int]) -> list[int]:
    schedule, found = Schedule(every), []
    for number in numbers:
        due = schedule.due
        schedule.end(number, due)
        if due:
            found.append(number)
    return found


def test_counted_steps_are_measured_at_multiples() -> None:
    assert measured(3, list(range(10))) == [0, 3, 6, 9]
    assert measured(1, list(range(4))) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (range(0, 40, 2), [0, 10, 20, 30]),
        (range(0, 40, 3), [0, 12, 21, 30]),
        (range(0, 60, 10), [0, 20, 30, 40, 50]),  # the first stride is not known before the second step
        (range(37, 60), [37, 40, 50]),
    ],
)
def test_the_users_own_numbers_are_followed(numbers: range, expected: list[int]) -> None:
    assert measured(10, list(numbers)) == expected


def test_the_first_measurements_are_in_full_and_then_one_of_four() -> None:
    for every, stride in ((1, 1), (10, 1), (10, 40), (10, 1_000)):
        schedule, step, full = Schedule(every), 0, []
        while len(full) < 17:
            measured = schedule.due
            if measured:
                full.append(schedule.in_full)
            schedule.end(step, measured)
            step += stride
        assert [count for count, whole in enumerate(full) if whole] == [*range(8), 8, 12, 16]
        resumed = Schedule(every)
        resumed.load_state_dict(schedule.state_dict())
        assert not resumed.in_full  # the 18th


def test_going_back_measures_again() -> None:
    assert measured(10, [*range(25), *range(10, 32)]) == [0, 10, 20, 11, 20, 30]


def test_a_step_that_was_due_and_not_measured_stays_due() -> None:
    schedule = Schedule(10)
    schedule.end(0, measured=True)
    assert not schedule.due
    for step in range(1, 10):
        schedule.end(step, measured=False)
    assert schedule.due
    schedule.end(10, measured=False)
    assert schedule.due


@pytest.mark.parametrize("stop", range(1, 12))
def test_state_goes_on_as_if_never_stopped(stop: int) -> None:
    whole, halves = Schedule(4), Schedule(4)
    trace: list[list[tuple[int, bool]]] = [[], []]
    for step in itertools.islice(itertools.count(0, 3), 14):
        if step == 3 * stop:
            state, halves = halves.state_dict(), Schedule(4)
            halves.load_state_dict(state)
        for schedule, seen in zip((whole, halves), trace, strict=True):
            due = schedule.due
            seen.append((schedule.next, due))
            schedule.end(step, due)
    assert trace[0] == trace[1]


def test_number() -> None:
    schedule = Schedule(5)
    assert schedule.number(None) == 0
    assert schedule.number(7) == 7
    with pytest.raises(TypeError):
        schedule.number("7")


@pytest.mark.parametrize("stride", [1, 2, 8, 32, 1000])
def test_spread_counts_calls_and_changes_place(stride: int) -> None:
    schedule, found = Schedule(10, spread=True), []
    for call in range(1000):
        due = schedule.due
        schedule.end(call * stride, due)
        if due:
            found.append(call)
    assert [call // 10 for call in found] == list(range(100))
    assert found[0] == 0
    places = [call % 10 for call in found]
    assert all(6 <= places.count(place) <= 14 for place in range(10))


def test_spread_measures_later_in_the_block_what_could_not_be() -> None:
    schedule = Schedule(10, spread=True)
    schedule.end(0, True)
    due = []
    for call in range(1, 30):
        due.append(schedule.due)
        schedule.end(call, measured=False)
    assert due == [16 <= call < 20 or call >= 22 for call in range(1, 30)]


def test_spread_goes_on_as_if_never_stopped() -> None:
    whole, trace = Schedule(10, spread=True), []
    for call in range(95):
        trace.append(whole.due)
        whole.end(call, trace[-1])
    halves = Schedule(10, spread=True)
    for call in range(95):
        if call == 47:
            state, halves = halves.state_dict(), Schedule(10, spread=True)
            halves.load_state_dict(state)
        assert halves.due == trace[call]
        halves.end(call, trace[call])

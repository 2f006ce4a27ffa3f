from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch

from entropy_monitor.hooks.sources import interception


def double(x: Any, factor: float = 2.0, *, plus: float = 0.0) -> Any:
    """Documented."""
    return x * factor + plus


def nested(x: Any) -> Any:
    return double(x) + 1


ALIAS = double


class Seen:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.results: list[Any] = []

    def __call__(self, function: Any, args: Any, kwargs: Any) -> Any:
        self.calls.append((function, args, kwargs))
        return self.results.append


def test_every_name_of_a_function_tells_and_nothing_is_left() -> None:
    code, attributes, signature = double.__code__, dict(vars(double)), inspect.signature(double)
    seen = Seen()
    undo = interception.install([double], seen)
    assert ALIAS(3, plus=1.0) == 7.0
    assert inspect.signature(double) == signature
    undo()
    assert seen.calls == [(double, (3,), {"plus": 1.0})]
    assert seen.results == [7.0]
    assert ALIAS(3) == 6.0
    assert len(seen.calls) == 1
    assert double.__code__ is code
    assert vars(double) == attributes


def test_calls_within_calls_other_threads_and_failures() -> None:
    seen = Seen()
    undo = interception.install([double, nested], seen)
    try:
        assert nested(1) == 3.0
        other = threading.Thread(target=double, args=(5,))
        other.start()
        other.join()
        with pytest.raises(TypeError):
            double(None)
        assert double(4) == 8.0
    finally:
        undo()
    assert [call[1] for call in seen.calls] == [(1,), (None,), (4,)]
    assert seen.results == [3.0, None, 8.0]


def test_installed_twice_and_undone_in_any_order() -> None:
    code, first, second = double.__code__, Seen(), Seen()
    undo_first = interception.install([double], first)
    undo_second = interception.install([double], second)
    double(1)
    undo_second()
    double(2)
    undo_first()
    assert double.__code__ is code
    assert [len(first.calls), len(second.calls)] == [1, 1]


def test_functions_with_free_variables_are_left_alone() -> None:
    free = 3

    def function(x: int) -> int:
        return x + free

    code = function.__code__
    undo = interception.install([function], Seen())
    assert function.__code__ is code
    undo()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_code_is_neither_compiled_anew_nor_left_out(fullgraph: bool) -> None:
    compiled = torch.compile(double, backend="eager", fullgraph=fullgraph)
    x = torch.randn(3)
    compiled(x)
    counters = torch._dynamo.utils.counters["stats"]
    before, seen = counters["unique_graphs"], Seen()
    undo = interception.install([double], seen)
    assert torch.equal(compiled(x), x * 2)
    undo()
    assert torch.equal(compiled(x), x * 2)
    assert len(seen.calls) == 1
    assert counters["unique_graphs"] == before


def test_code_that_is_compiled_meanwhile_tells_nothing() -> None:
    def uses(x: torch.Tensor) -> torch.Tensor:
        return nested(x) + 1

    seen = Seen()
    undo = interception.install([double, nested], seen)
    x = torch.randn(3)
    assert torch.equal(torch.compile(uses, backend="eager", fullgraph=True)(x), x * 2 + 2)
    undo()
    assert seen.calls == []

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools

import pytest

from entropy_monitor.analyzer import Thresholds, thresholds
from entropy_monitor.errors import ConfigurationError

NAMES = [field.name for field in dataclasses.fields(Thresholds)]


def test_every_threshold_has_a_range_and_a_docstring() -> None:
    assert [name for name, _, _ in thresholds._RANGES] == NAMES
    tree = ast.parse(inspect.getsource(Thresholds))
    assert isinstance(tree.body[0], ast.ClassDef)
    body = tree.body[0].body
    documented = [
        node.target.id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    ]
    assert documented == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_out_of_range_names_the_value_and_the_range(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"Thresholds\.{name} must lie in \[.*\], not {value}"):
        Thresholds(**{name: value})  # type: ignore[arg-type]


def test_contradiction_names_both() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"collapse_bottom \(0.2\) must be below Thresholds.collapse_share \(0.08\)",
    ):
        Thresholds(collapse_bottom=0.2)


def test_counts_are_whole_numbers() -> None:
    with pytest.raises(ConfigurationError, match=r"open_after must be a whole number, not 2.5"):
        Thresholds(open_after=2.5)  # type: ignore[arg-type]


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Thresholds().open_after = 3  # type: ignore[misc]

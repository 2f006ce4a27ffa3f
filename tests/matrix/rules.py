"""From a test and its parameters to a cell of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
NUMERICS = "figures"
SAME = "same to the bit"


class Cell(NamedTuple):
    """A cell of the table."""

    group: str
    row: str
    column: str


@dataclass(frozen=True)
class Rule:
    """Tests that speak for cells.

    Attributes:
        group: the table that they belong to.
        file: pattern of the file, below `tests/`.
        test: pattern of the function's name.
        row: text with the test's parameters in braces; a test that lacks one has no cell.
        column: likewise.
        quick: whether `make test` runs a test with such parameters.
    """

    group: str
    file: str
    test: str
    row: str
    column: str
    quick: Callable[[Mapping[str, str]], bool] = lambda names: True


FIGURES_OF_FAMILIES = ("test_calls_are_found_in_order", "test_attention", "test_spectral_norms", "test_maps")


RULES = (
    *(
        Rule("Model families", "families/test_families.py", test, "{name}", "{way}")
        for test in FIGURES_OF_FAMILIES
    ),
    Rule(
        "Model families", "families/test_families.py", "test_a_training_forward", "{name}", "{way}, training",
    ),
    Rule("Hand-written models", "hooks/test_zoo.py", "test_every_column", "{name:kind}", NUMERICS),
    Rule("Attention functions", "hooks/sources/test_flash.py", "*", "flash-attn, stand-in kernels", NUMERICS),
    Rule(
        "Attention functions", "hooks/sources/test_xformers.py", "*", "xformers, stand-in kernels", NUMERICS,
    ),
    Rule("Attention functions", "hooks/sources/test_flex.py", "test_eager", "FlexAttention", NUMERICS),
    Rule(
        "Attention functions", "hooks/sources/test_flex.py", "test_compiled*", "FlexAttention, compiled",
        NUMERICS,
    ),
    Rule(
        "Attention functions", "hooks/sources/test_transformers_flash.py", "*",
        "transformers flash_attention_2, stand-in kernels", NUMERICS,
    ),
    Rule(
        "Attention functions", "hooks/sources/test_normalised.py", "test_weights",
        "without a softmax: {name}", NUMERICS,
    ),
    Rule("Training modes", "test_unchanged_training.py", "test_on_equals_off", "{mode}", SAME),
    Rule("torch.compile", "compiled/test_modes.py", "test_watched_equals_unwatched", "{mode}", SAME),
    Rule("Distributed, gloo", "distributed/test_*.py", "*", "{spread}", "as one process"),
    Rule("Distributed, gloo", "distributed/test_*.py", "test_ddp_in_its_modes", "ddp, its options", SAME),
    Rule(
        "Distributed, gloo", "distributed/test_*.py", "test_a_killed_rank*", "a rank is killed",
        "the run stays readable",
    ),
    Rule("Frameworks", "callbacks/test_huggingface.py", "test_on_equals_off", "Trainer, {mode}", SAME),
    Rule("Frameworks", "callbacks/test_lightning.py", "test_on_equals_off", "{package}, {mode}", SAME),
    Rule("Frameworks", "callbacks/test_accelerate.py", "test_on_equals_off", "Accelerate, {mode}", SAME),
    Rule("Frameworks", "callbacks/test_huggingface.py", "test_resume_*", "Trainer", "resume"),
    Rule("Frameworks", "callbacks/test_lightning.py", "test_resume_*", "{package}", "resume"),
    Rule("Frameworks", "callbacks/test_accelerate.py", "test_resume_*", "Accelerate", "resume"),
)  # fmt: skip


def cells_of(item: pytest.Item) -> list[tuple[Cell, bool]]:
    """The cells that a test speaks for, and whether `make test` runs it."""
    marked = [Cell(**mark.kwargs) for mark in item.iter_markers("matrix")]
    if marked:
        return [(cell, True) for cell in marked]
    file = Path(item.path).relative_to(TESTS).as_posix() if TESTS in Path(item.path).parents else ""
    function = getattr(item, "originalname", item.name)
    names = _names(item)
    found = []
    for rule in RULES:
        if not (fnmatchcase(file, rule.file) and fnmatchcase(function, rule.test)):
            continue
        row, column = _filled(rule.row, names), _filled(rule.column, names)
        if row is not None and column is not None:
            found.append((Cell(rule.group, row, column), rule.quick(names)))
    return found[:1]


def _names(item: pytest.Item) -> dict[str, str]:
    """The test's parameters as words: texts as they are, others by their keys in a dict of the module."""
    call = getattr(item, "callspec", None)
    module = getattr(item, "module", None)
    tables = [value for value in vars(module).values() if isinstance(value, dict)] if module else []
    names = {"test": getattr(item, "originalname", item.name).removeprefix("test_").replace("_", " ")}
    for parameter, value in (call.params if call is not None else {}).items():
        names[parameter] = value if isinstance(value, str) else _key(value, tables)
    return names


def _key(value: object, tables: list[dict[Any, Any]]) -> str:
    found = (str(key) for table in tables for key, entry in table.items() if entry is value)
    return next(found, str(value))


def _filled(text: str, names: Mapping[str, str]) -> str | None:
    """A text with names filled in; `{name:kind}` is the part before the first hyphen."""
    out = ""
    for literal, field, form, _ in Formatter().parse(text):
        out += literal
        if field is None:
            continue
        if field not in names:
            return None
        out += names[field].partition("-")[0] if form == "kind" else names[field]
    return out

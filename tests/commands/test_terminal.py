from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entropy_monitor.commands.terminal import fit, folded, plain, print_json, shown, table, wrapped
from tests.dashboards.records_factory import event


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how wide the terminal is."""
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\nlines\tand  gaps", "two lines and gaps"),
        ("\x1b[31mred\x1b]0;title\x07", "�[31mred�]0;title�"),
        ("a\u202egnp.exe", "a�gnp.exe"),
        ("σ × ‖W‖ é 日本", "σ × ‖W‖ é 日本"),
        (Path("a/b"), "a/b"),
    ],
)
def test_text_of_a_run_is_text(text: object, expected: str) -> None:
    assert shown(text) == expected


@pytest.mark.parametrize("width", [40, 80, 200])
def test_paragraphs_fit_the_terminal_and_stay_readable(columns: Any, width: int) -> None:
    columns(width)
    lines = wrapped("word " * 100, "    ", "- ").splitlines()
    assert max(map(len, lines)) <= min(width, 120)
    assert lines[0].startswith("- word")
    assert all(line.startswith("    word") for line in lines[1:])
    assert sum(line.count("word") for line in lines) == 100


def test_nothing_is_a_line_too() -> None:
    assert wrapped("", "  ", "- ") == "- "


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_the_terminal(columns: Any, width: int) -> None:
    columns(width)
    names = [f"sweep/lr-{rate}-warmup-{steps}-and-a-very-long-tail" for rate in (1, 2) for steps in (10, 20)]
    lines = table(("run", "loss", "verdict"), [(name, "1.5", "sound") for name in names]).splitlines()
    assert max(map(len, lines)) <= width
    assert len({line.split()[0] for line in lines[1:]}) == 4
    ends = {
        line.index(word) + len(word) for line, word in zip(lines, ["verdict", *["sound"] * 4], strict=True)
    }
    assert len(ends) == 1
    if width == 200:
        assert [line.split()[0] for line in lines[1:]] == names


@pytest.mark.parametrize(
    ("names", "room", "expected"),
    [
        (["a", "bb"], 2, ["a", "bb"]),
        (["model-lr-1e-3", "model-lr-2e-2"], 8, ["…1e-3", "…2e-2"]),
        (["abcdefghij"], 5, ["ab…ij"]),
        (["abcdefghij", "x"], 5, ["ab…ij", "x"]),
        (["runs/alpha-and-more", "runs/beta"], 8, ["…al…more", "…beta"]),
    ],
)
def test_names_are_shortened_where_they_are_alike(names: list[str], room: int, expected: list[str]) -> None:
    assert fit(names, room) == expected


def test_lines_of_a_table_keep_their_columns(columns: Any) -> None:
    columns(40)
    line = "layers.0    softmax    4 heads    all rows, in blocks"
    assert folded(line, "      ") == "layers.0    softmax    4 heads    all\n      rows, in blocks"
    assert folded("  \x1b[2J", "") == "  �[2J"


def test_json_is_strict_and_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        "nan": math.nan,
        "infinite": [math.inf, np.float32(-np.inf)],
        "array": np.arange(2, dtype=np.int32),
        "path": Path("σ"),
        "alert": event().alert,
        1: None,
        "flag": True,
        "nested": ({"x": 0.5},),
    }
    print_json(given)
    text = capsys.readouterr().out
    assert text.isascii()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["nan"] is None
    assert found["infinite"] == [None, None]
    assert found["array"] == [0, 1]
    assert found["path"] == "σ"
    assert found["alert"]["heads"] == [0, 2]
    assert found["1"] is None
    assert found["flag"] is True
    assert found["nested"] == [{"x": 0.5}]
    print_json({"a": 1, "b": 2}, one_line=True)
    assert capsys.readouterr().out == '{"a": 1, "b": 2}\n'


def test_what_json_has_no_word_for_is_text() -> None:
    assert plain(complex(1, 2)) == "(1+2j)"

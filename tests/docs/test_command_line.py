"""The page of the command line names every command and option that there is, and no other."""

from __future__ import annotations

import argparse
import re

import pytest

from entropy_monitor import cli
from tests.docs.pages import ALL, DOCS, code, headings, name_of, tables

PAGE = DOCS / "command-line.md"


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command, by name."""
    (group,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(group.choices)


def arguments(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a command takes, as its help names it; `--help` goes without saying."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        found[name] = action
    return found


def test_every_command_has_a_section() -> None:
    assert [h for h in headings(PAGE) if h in commands()] == list(commands())


@pytest.mark.parametrize("name", commands())
def test_every_argument_is_described(name: str) -> None:
    (found,) = tables(PAGE, name)
    given = arguments(commands()[name])
    assert [", ".join(re.findall(r"`([^`]+)`", row[0])) for row in found] == list(given)
    for (_, meaning, default), action in zip(found, given.values(), strict=True):
        assert meaning
        assert [f"`{choice}`" for choice in action.choices or () if f"`{choice}`" not in meaning] == []
        is_said = action.option_strings and action.nargs != 0 and action.default is not None
        assert default == (f"`{action.default}`" if is_said else "")


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_commands_that_are_named_are_there(page: object) -> None:
    text = page.read_text("utf-8")  # type: ignore[attr-defined]
    blocks = "\n".join(block.text for block in code(page, "sh"))  # type: ignore[arg-type]
    spans = "\n".join(re.findall(r"`(entropy-monitor[^`]*)`", text))
    for line in (blocks + "\n" + spans).splitlines():
        found = re.match(r"entropy-monitor ([a-z]+)(.*)", line)
        if found is None:
            continue
        assert found[1] in commands(), line
        known = {option for a in commands()[found[1]]._actions for option in a.option_strings}
        assert set(re.findall(r"(?<![\w-])--[\w-]+", found[2].partition("#")[0])) <= known, line

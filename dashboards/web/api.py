"""The questions that the page may ask: a request's parameters in, the answer out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from entropy_monitor.dashboards.run_view import RunView
from entropy_monitor.dashboards.web.library import Library
from entropy_monitor.errors import ConfigurationError

Arguments: TypeAlias = Mapping[str, str]
Answer: TypeAlias = dict[str, Any]

_MOST_LAYERS = 64
_POINTS = range(16, 5001)
_WHOLE = re.compile(r"-?[0-9]{1,9}")


class Api:
    """Answers by name; every one takes the request's parameters.

    Args:
        library: the runs.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._of_a_run: dict[str, Callable[[RunView, Arguments], Answer]] = {
            "overview": lambda view, _: view.overview(),
            "curves": lambda view, given: view.curves(
                _text(given, "column"), _layers(given), _whole(given, "points", 600, _POINTS)
            ),
            "summary": lambda view, given: view.summary_curves(_whole(given, "points", 600, _POINTS)),
            "grid": lambda view, given: view.grid(_text(given, "column"), _whole(given, "position")),
            "head": lambda view, given: view.head(
                _whole(given, "row"), _whole(given, "points", 1000, _POINTS)
            ),
            "scalar": lambda view, given: view.scalar(
                given.get("name", "loss"), _whole(given, "points", 1000, _POINTS)
            ),
            "map": lambda view, given: view.attention_map(_text(given, "alert")),
        }

    def knows(self, name: str) -> bool:
        """Whether there is a question of that name."""
        return name == "runs" or name in self._of_a_run

    def answer(self, name: str, given: Arguments) -> Answer:
        """Answer one question.

        Raises:
            ConfigurationError: a parameter is missing, or is not one of the run.
            UnknownRunError: there is no such run.
        """
        if name == "runs":
            return {"folder": self._library.folder, "runs": self._library.cards()}
        question = self._of_a_run[name]
        return self._library.ask(_text(given, "run"), lambda view: question(view, given))


def _text(given: Arguments, name: str) -> str:
    if name not in given:
        raise ConfigurationError(f"the parameter {name} is missing")
    return given[name]


def _whole(given: Arguments, name: str, default: int | None = None, allowed: range | None = None) -> int:
    text = _text(given, name) if default is None else given.get(name, str(default))
    if not _WHOLE.fullmatch(text):
        raise ConfigurationError(f"{name} must be a whole number; it is {text[:40]!r}")
    value = int(text)
    if allowed is not None and value not in allowed:
        raise ConfigurationError(f"{name} must be {allowed[0]} to {allowed[-1]}; it is {value}")
    return value


def _layers(given: Arguments) -> list[int] | None:
    """Places of layers, as `0,3,7`; None for the view's own choice."""
    text = given.get("layers", "")
    if not text:
        return None
    parts = text.split(",")
    if len(parts) > _MOST_LAYERS:
        raise ConfigurationError(f"layers names {len(parts)}; {_MOST_LAYERS} can be asked for at once")
    return [_whole({"layers": part}, "layers") for part in parts]

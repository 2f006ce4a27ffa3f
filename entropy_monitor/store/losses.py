"""What of a stream could not be read, in words."""

from __future__ import annotations

from typing import Literal

UNFINISHED = "still being written, or cut short"
"""Ends the words on a file whose last piece is not whole: no damage as long as a run goes on."""


class Losses:
    """Follows the numbers of a stream's sound messages, and tells what is missing between and after them.

    Args:
        name: of the file.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._number = -1
        self._gap = 0
        self._damage: list[str] = []
        self._tail = ""

    @property
    def in_words(self) -> list[str]:
        """Each with the file, the batches (from 1) and the bytes concerned."""
        return [*self._damage, *([self._tail] if self._tail else [])]

    def gap(self, size: int) -> None:
        """Bytes that belong to no sound message stand before the next one."""
        self._gap = size

    def message(self, number: int) -> None:
        """A sound message; number 0 is the schema."""
        lost = _named(self._number + 1, number - 1) if number > self._number + 1 else ""
        if lost:
            size = f" ({self._gap} bytes)" if self._gap else ""
            self._damage.append(f"{self._name}: {lost} damaged{size}: not read")
        elif self._gap:
            self._damage.append(
                f"{self._name}: {self._gap} damaged bytes before {_named(number, number)}: "
                "no batch is missing"
            )
        self._gap = 0
        self._number = number

    def damaged(self, number: int, size: int) -> None:
        """A message that was counted turned out not to be what was written."""
        self._damage.append(f"{self._name}: {_named(number, number)} damaged ({size} bytes): not read")

    def undecodable(self, first: int, last: int, why: object) -> None:
        """Sound messages cannot be decoded."""
        self._damage.append(f"{self._name}: {_named(first, last)} cannot be decoded: {why}")

    def tail(self, kind: Literal["open", "closed", "torn", "damaged"], size: int) -> None:
        """What follows the last sound message, and of how many bytes."""
        after = f"after {_named(self._number, self._number)}" if self._number >= 0 else "from the start"
        self._tail = ""
        if kind == "damaged":
            self._tail = f"{self._name}: {size} damaged bytes {after}: not read"
        elif kind == "torn":
            self._tail = f"{self._name}: {size} bytes {after} are no whole batch: {UNFINISHED}"


def _named(first: int, last: int) -> str:
    if last <= 0:
        return "the schema"
    if first <= 0:
        return f"the schema and {_named(1, last)}"
    return f"batch {first}" if first == last else f"batches {first} to {last}"

"""`MessageWalk`: where the messages of a file lie that grows, found without reading more than their seals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from entropy_monitor.store.framing import (
    END,
    PREFIX,
    SEAL_LENGTH,
    Gap,
    Seal,
    Tail,
    checksum,
    metadata_length,
    seals,
    tail_of,
)

_WINDOW = 1 << 16
"""Bytes read at once: a system call for each of many small messages would take most of the time."""

_MOST_METADATA = 1 << 20


class Placed(NamedTuple):
    """A message: the file's bytes from `start` to `stop`, those before its body in `head`."""

    number: int
    start: int
    stop: int
    head: bytes


class MessageWalk:
    """Goes from message to message of a file, and on from there when it has grown.

    A seal is believed where its message has the number that is due and another message, or nothing, follows
    where it says that it ends. Otherwise its checksum decides, and where that is wrong too the next sound
    message is looked for. So what `framing.scan` finds is found here, and what it finds damaged is either
    found damaged or a message whose place is right and whose content is not.

    Attributes:
        tail: what follows the last message.
        tail_size: of how many bytes.
    """

    def __init__(self) -> None:
        self.tail: Tail = "open"
        self.tail_size = 0
        self._offset = 0
        self._number = -1
        self._last: tuple[int, bytes] = 0, b""

    def is_of(self, file: BinaryIO) -> bool:
        """Whether an open file is still the one that was walked, and not another of its name."""
        start, head = self._last
        return _size(file) >= self._offset and read_at(file, start, len(head)) == head

    def advance(self, file: BinaryIO) -> Iterator[Placed | Gap]:
        """The messages that were added to an open file, and the gaps between them."""
        pieces = _Pieces(file)
        while True:
            begin = pieces.read(self._offset, PREFIX)
            rest = pieces.size - self._offset
            if not rest or (rest == PREFIX and begin == END):
                first_stop = None
                break
            found = self._expected(pieces, begin)
            if found is None:
                found, first_stop = self._searched(pieces)
            if found is None:
                break
            if found.start > self._offset:
                yield Gap(self._offset, found.start)
            self._offset, self._number = found.stop, found.number
            self._last = found.start, found.head
            yield found
        self.tail, self.tail_size = tail_of(begin, first_stop, rest), rest

    def _expected(self, pieces: _Pieces, begin: bytes) -> Placed | None:
        """The message that begins where the last one ends."""
        length = metadata_length(begin)
        if not length or length > _MOST_METADATA:
            return None
        start = self._offset
        head = pieces.read(start, PREFIX + length)
        seal = next(seals(head), None)
        if seal is None or seal.start != 0 or not len(head) <= seal.stop <= pieces.size - start:
            return None
        is_due = seal.number == self._number + 1 and seal.number > 0
        stop = start + seal.stop
        if not (is_due and END.startswith(pieces.read(stop, 4))) and not pieces.are_sound(start, stop, seal):
            return None
        return Placed(seal.number, start, stop, head)

    def _searched(self, pieces: _Pieces) -> tuple[Placed | None, int | None]:
        """The next sound message; or None, and where the first one says that it ends, counted from here."""
        first_stop = None
        for seal in pieces.seals(self._offset):
            if first_stop is None:
                first_stop = seal.stop - self._offset
            fits = self._offset <= seal.start and seal.place + SEAL_LENGTH <= seal.stop <= pieces.size
            if fits and pieces.are_sound(seal.start, seal.stop, seal):
                length = PREFIX + (metadata_length(pieces.read(seal.start, PREFIX)) or 0)
                head = pieces.read(seal.start, min(length, seal.stop - seal.start))
                return Placed(seal.number, seal.start, seal.stop, head), None
        return None, first_stop


class _Pieces:
    """A file's bytes, kept a window at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = _size(file)
        self._file = file
        self._start = 0
        self._kept = b""

    def read(self, start: int, length: int) -> bytes:
        """Bytes from `start` on, fewer where the file ends."""
        at = start - self._start
        if at < 0 or at + length > len(self._kept):
            self._start, at = start, 0
            self._kept = read_at(self._file, start, max(length, min(_WINDOW, self.size - start)))
        return self._kept[at : at + length]

    def are_sound(self, start: int, stop: int, seal: Seal) -> bool:
        """Whether the message from `start` to `stop` has the checksum that its seal states."""
        places = range(start, stop, _WINDOW)
        pieces = (read_at(self._file, place, min(_WINDOW, stop - place)) for place in places)
        return checksum(pieces, seal.digits) == seal.crc

    def seals(self, start: int) -> Iterator[Seal]:
        """Every seal from `start` on; its place is that in the file."""
        while start < self.size:
            # Windows overlap, for a seal may lie across their border.
            data = read_at(self._file, start, _WINDOW + SEAL_LENGTH - 1)
            for seal in seals(data):
                if seal.place < _WINDOW:
                    at = {name: start + getattr(seal, name) for name in ("place", "start", "stop")}
                    yield seal._replace(**at)
            start += _WINDOW


def read_at(file: BinaryIO, start: int, length: int) -> bytes:
    """Bytes of an open file from `start` on, fewer where it ends."""
    file.seek(start)
    return file.read(length)


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size

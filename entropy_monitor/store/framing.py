"""Where a stream's messages lie and whether they are what was written, before anything decodes them.

An Arrow IPC stream is a row of messages: a schema, then record batches. Arrow has no checksum, and
a changed length makes every later message unreachable. So each message carries a *seal* in its
metadata, a text of fixed width which holds the message's number, its length, the seal's own place
in it, a fingerprint of the schema and the CRC-32 of all its bytes (with the CRC's own digits as
zeros). A reader looks for seals, not for lengths: a damaged message costs itself only, and no byte
reaches the decoder that the checksum does not vouch for. Other Arrow readers see a plain IPC
stream.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

SEAL_KEY = "entropy_monitor.seal"
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Arrow's mark for the end of a stream, which a writer leaves when it is closed."""

PREFIX = 8
"""Bytes before a message's metadata: a mark, and the metadata's length."""

_HEX = rb"([0-9a-f]{8})"
_SEAL = re.compile(rb"EMSEAL number=%b start=%b length=%b schema=%b crc=%b" % (_HEX, _HEX, _HEX, _HEX, _HEX))
_NO_CRC = b"00000000"

Bytes: TypeAlias = bytes | memoryview

Tail: TypeAlias = Literal["open", "closed", "torn", "damaged"]
"""What follows the last sound message: nothing, the end mark, a message that lacks bytes, damage."""


class Seal(NamedTuple):
    """What a seal says.

    Attributes:
        place: where it was found.
        number: of its message: 0 is the schema, batches count from 1.
        start: where that begins, counted as `place` is.
        stop: where it ends.
        schema: fingerprint of the schema.
        crc: of the message's bytes, the eight digits at `digits` taken as zeros.
        digits: where these are, counted from the message's first byte.
    """

    place: int
    number: int
    start: int
    stop: int
    schema: int
    crc: int
    digits: int


@dataclass(frozen=True)
class Message:
    """One message: `data[start:stop]`. Number 0 is the schema, batches count from 1."""

    number: int
    schema: int
    start: int
    stop: int


@dataclass(frozen=True)
class Gap:
    """Bytes between sound messages that belong to none: `data[start:stop]`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Scan:
    """What a piece of a stream holds.

    Attributes:
        parts: sound messages and the gaps between them, in order.
        stop: where the last sound message ends.
        tail: what follows.
    """

    parts: tuple[Message | Gap, ...]
    stop: int
    tail: Tail


def blank_seal(number: int, schema: int) -> str:
    """A seal with its number and schema, to be put into a message's metadata and completed by `seal`."""
    return f"EMSEAL number={number:08x} start={0:08x} length={0:08x} schema={schema:08x} crc={0:08x}"


def seal(message: bytes) -> bytes:
    """`message` with its blank seal completed."""
    sealed = bytearray(message)
    # The metadata comes before the body: the first seal is the message's own.
    match = _SEAL.search(message)
    if match is None:
        raise ValueError("the message's metadata holds no blank seal")
    sealed[slice(*match.span(2))] = b"%08x" % match.start()
    sealed[slice(*match.span(3))] = b"%08x" % len(message)
    sealed[slice(*match.span(5))] = b"%08x" % zlib.crc32(sealed)
    return bytes(sealed)


def scan(data: bytes) -> Scan:
    """Find every sound message of `data`, which begins where a message begins."""
    parts: list[Message | Gap] = []
    stop = 0
    for message in _sound_messages(data):
        if message.start > stop:
            parts.append(Gap(stop, message.start))
        parts.append(message)
        stop = message.stop
    return Scan(tuple(parts), stop, _tail(data, stop))


SEAL_LENGTH = len(blank_seal(0, 0))


def metadata_length(prefix: bytes) -> int | None:
    """How long a message's metadata is, from its first `PREFIX` bytes; None if it begins otherwise."""
    if len(prefix) < PREFIX or not prefix.startswith(END[:4]) or prefix[:PREFIX] == END:
        return None
    return int.from_bytes(prefix[4:PREFIX], "little")


def seals(data: Bytes, position: int = 0) -> Iterator[Seal]:
    """Every seal from `position` on, whether or not its message is sound."""
    while match := _SEAL.search(data, position):
        number, offset, length, schema, crc = [int(group, 16) for group in match.groups()]
        start = match.start() - offset
        yield Seal(match.start(), number, start, start + length, schema, crc, match.start(5) - start)
        position = match.end()


def checksum(pieces: Iterable[Bytes], digits: int) -> int:
    """The CRC-32 of a message given in pieces, the digits of its seal's own as zeros.

    Args:
        pieces: the message's bytes, in order.
        digits: where these digits are.
    """
    crc = position = 0
    for piece in pieces:
        first, last = digits - position, digits - position + len(_NO_CRC)
        if last <= 0 or first >= len(piece):
            crc = zlib.crc32(piece, crc)
        else:
            first, last = max(first, 0), min(last, len(piece))
            crc = zlib.crc32(
                piece[last:], zlib.crc32(_NO_CRC[: last - first], zlib.crc32(piece[:first], crc))
            )
        position += len(piece)
    return crc


def is_sound(message: Bytes) -> bool:
    """Whether these bytes, from a message's first to its last, are what was written."""
    found = next(seals(message), None)
    return found is not None and checksum([memoryview(message)], found.digits) == found.crc


def _sound_messages(data: bytes) -> Iterator[Message]:
    view = memoryview(data)
    position = lower = 0
    while found := next(seals(data, position), None):
        start, stop = found.start, found.stop
        fits = lower <= start and found.place + SEAL_LENGTH <= stop <= len(data)
        if fits and checksum([view[start:stop]], found.digits) == found.crc:
            yield Message(found.number, found.schema, start, stop)
            position = lower = stop
        else:
            position = found.place + SEAL_LENGTH


def tail_of(begin: bytes, first_stop: int | None, size: int) -> Tail:
    """What the bytes after the last sound message are.

    Args:
        begin: the first `PREFIX` of them or more.
        first_stop: where the message of the first seal among them ends by its word, counted from their
            first; None where there is no seal.
        size: how many they are.
    """
    if not size:
        return "open"
    if size == len(END) and begin.startswith(END):
        return "closed"
    if first_stop is None:
        # Too little of a message to hold its seal, unless it does not even begin like one.
        return "torn" if begin.startswith(END[: min(4, size)]) else "damaged"
    return "torn" if first_stop > size else "damaged"


def _tail(data: bytes, stop: int) -> Tail:
    rest = data[stop:]
    first = next(seals(rest), None)
    return tail_of(rest, first.stop if first else None, len(rest))

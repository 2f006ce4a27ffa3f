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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

SEAL_KEY = "entropy_monitor.seal"
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""Arrow's mark for the end of a stream, which a writer leaves when it is closed."""

_HEX = rb"([0-9a-f]{8})"
_SEAL = re.compile(rb"EMSEAL number=%b start=%b length=%b schema=%b crc=%b" % (_HEX, _HEX, _HEX, _HEX, _HEX))
_NO_CRC = b"00000000"


@dataclass(frozen=True)
class Message:
    """One sound message: `data[start:stop]`. Number 0 is the schema, batches count from 1."""

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
        tail: what follows: nothing, the end mark, a message of which bytes are missing, or damage.
    """

    parts: tuple[Message | Gap, ...]
    stop: int
    tail: Literal["open", "closed", "torn", "damaged"]


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


PREFIX = 8
"""Bytes before a message's metadata: a mark, and the metadata's length."""


def metadata_length(prefix: bytes) -> int | None:
    """How long a message's metadata is, from its first `PREFIX` bytes; None if it begins otherwise."""
    if len(prefix) < PREFIX or not prefix.startswith(END[:4]) or prefix[:PREFIX] == END:
        return None
    return int.from_bytes(prefix[4:PREFIX], "little")


def peek(head: bytes) -> Message | None:
    """The message whose prefix and metadata are `head`, by its seal alone: ask `is_sound` too."""
    match = _SEAL.search(head)
    if match is None:
        return None
    number, offset, length, schema, _ = (int(group, 16) for group in match.groups())
    if offset != match.start() or length < len(head):
        return None
    return Message(number, schema, 0, length)


def is_sound(message: bytes) -> bool:
    """Whether these bytes, from a message's first to its last, are what was written."""
    match = _SEAL.search(message)
    return match is not None and _crc(message, 0, len(message), match.start(5)) == int(match[5], 16)


def _sound_messages(data: bytes) -> Iterator[Message]:
    position = 0
    lower = 0
    while match := _SEAL.search(data, position):
        number, offset, length, schema, crc = (int(group, 16) for group in match.groups())
        start = match.start() - offset
        stop = start + length
        if (
            lower <= start
            and match.end() <= stop <= len(data)
            and _crc(data, start, stop, match.start(5)) == crc
        ):
            yield Message(number, schema, start, stop)
            position = lower = stop
        else:
            position = match.end()


def _crc(data: bytes, start: int, stop: int, digits: int) -> int:
    view = memoryview(data)
    crc = zlib.crc32(view[start:digits])
    crc = zlib.crc32(_NO_CRC, crc)
    return zlib.crc32(view[digits + len(_NO_CRC) : stop], crc)


def _tail(data: bytes, stop: int) -> Literal["open", "closed", "torn", "damaged"]:
    rest = data[stop:]
    if not rest:
        return "open"
    if rest == END:
        return "closed"
    match = _SEAL.search(rest)
    if match is None:
        # Too little of a message to hold its seal, unless it does not even begin like one.
        return "torn" if rest.startswith(END[: min(4, len(rest))]) else "damaged"
    length = int(match[3], 16)
    return "torn" if match.start() - int(match[2], 16) + length > len(rest) else "damaged"

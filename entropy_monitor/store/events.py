"""Changes of alerts as lines of text, each with a checksum, and back."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from entropy_monitor.records import Alert, AlertEvent
from entropy_monitor.store.plain import from_json, to_json

_START = b'{"crc32":"'
_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})","event":([^\n]*)\}\n')


@dataclass(frozen=True)
class EventLog:
    """What a log holds: its events, the numbers (from 1) of damaged lines, and whether its end is torn."""

    events: tuple[AlertEvent, ...]
    damaged: tuple[int, ...]
    torn: bool


def encode_event(event: AlertEvent) -> bytes:
    """One line: `{"crc32": …, "event": {…}}`, the checksum being over the event's text."""
    body = to_json(asdict(event)).encode()
    return b'%b%08x","event":%b}\n' % (_START, zlib.crc32(body), body)


def decode_events(data: bytes) -> EventLog:
    """Read a log. What is damaged costs its own line only; an end without a newline is torn, not damaged."""
    events: list[AlertEvent] = []
    damaged: list[int] = []
    # Lines are told apart by how they begin, not by the newline, which may itself be what was changed.
    starts = [match.start() for match in re.finditer(re.escape(_START), data)]
    if data and starts[:1] != [0]:
        starts.insert(0, 0)
    number = 0
    for start, stop in itertools.pairwise([*starts, len(data)]):
        event, rest = _decode_line(data[start:stop])
        if event is not None:
            events.append(event)
            number += 1
        if rest:
            number += 1
            if stop < len(data) or rest.endswith(b"\n"):
                damaged.append(number)
    torn = bool(data) and not data.endswith(b"\n")
    return EventLog(tuple(events), tuple(damaged), torn)


def _decode_line(text: bytes) -> tuple[AlertEvent | None, bytes]:
    """The event that `text` begins with, if any, and the bytes that are not its."""
    match = _LINE.match(text)
    if match is None or b"%08x" % zlib.crc32(match[2]) != match[1]:
        return None, text
    try:
        return _event(from_json(match[2].decode())), text[match.end() :]
    except (ValueError, KeyError, TypeError):
        return None, text


def _event(value: Mapping[str, Any]) -> AlertEvent:
    alert = Alert(**{**value["alert"], "heads": tuple(value["alert"]["heads"])})
    return AlertEvent(value["event"], value["step"], alert)

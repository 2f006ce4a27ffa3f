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
_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})","event":(.*)\}\n', re.DOTALL)


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
    for number, (start, stop) in enumerate(itertools.pairwise([*starts, len(data)]), start=1):
        event = _decode_line(data[start:stop])
        if event is not None:
            events.append(event)
        elif stop < len(data) or data.endswith(b"\n"):
            damaged.append(number)
    torn = bool(data) and not data.endswith(b"\n")
    return EventLog(tuple(events), tuple(damaged), torn)


def _decode_line(line: bytes) -> AlertEvent | None:
    match = _LINE.fullmatch(line)
    if match is None or zlib.crc32(match[2]) != int(match[1], 16):
        return None
    try:
        return _event(from_json(match[2].decode()))
    except (ValueError, KeyError, TypeError):
        return None


def _event(value: Mapping[str, Any]) -> AlertEvent:
    alert = Alert(**{**value["alert"], "heads": tuple(value["alert"]["heads"])})
    return AlertEvent(value["event"], value["step"], alert)

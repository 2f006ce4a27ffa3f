from __future__ import annotations

import zlib

from entropy_monitor.store.events import decode_events, encode_event
from tests.store.samples import event

EVENTS = (event(1), event(2, "updated", opened=1), event(3, "closed", opened=1))
LINES = [encode_event(item) for item in EVENTS]


def test_events_come_back_in_order() -> None:
    found = decode_events(b"".join(LINES))
    assert [repr(item) for item in found.events] == [repr(item) for item in EVENTS]
    assert (found.damaged, found.torn) == ((), False)
    assert decode_events(b"").events == ()


def test_every_truncation_costs_the_last_line_only() -> None:
    data = b"".join(LINES)
    bounds = [0, len(LINES[0]), len(LINES[0] + LINES[1]), len(data)]
    for length in range(len(data)):
        found = decode_events(data[:length])
        assert len(found.events) == sum(bound <= length for bound in bounds[1:])
        assert found.damaged == ()
        assert found.torn == (length not in bounds)


def test_every_bit_flip_is_found_and_costs_its_line_only() -> None:
    data = b"".join(LINES)
    owner = [number for number, line in enumerate(LINES) for _ in line]
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            found = decode_events(bytes(changed))
            kept = [number for number in range(3) if number != owner[place]]
            assert [item.step for item in found.events] == [EVENTS[n].step for n in kept]
            assert found.damaged or found.torn


def test_a_sound_line_of_something_else_is_damage() -> None:
    body = b'{"event":"opened"}'
    line = b'{"crc32":"%08x","event":%b}\n' % (zlib.crc32(body), body)
    assert decode_events(line + LINES[0]).damaged == (1,)

from __future__ import annotations

import random

import pytest

from entropy_monitor.store.framing import END, Gap, Message, blank_seal, scan, seal


def message(number: int, body: bytes = b"body" * 10) -> bytes:
    return seal(b"\xff\xff\xff\xff\x00\x01\x00\x00" + blank_seal(number, 0xABCD).encode() + body)


def numbers(data: bytes) -> list[int]:
    return [part.number for part in scan(data).parts if isinstance(part, Message)]


def test_messages_are_found_with_their_places() -> None:
    first, second = message(0), message(1, b"")
    found = scan(first + second)
    assert found.parts == (
        Message(0, 0xABCD, 0, len(first)),
        Message(1, 0xABCD, len(first), len(first) + len(second)),
    )
    assert (found.stop, found.tail) == (len(first + second), "open")


def test_the_end_mark_closes_a_stream() -> None:
    assert scan(message(0) + END).tail == "closed"


def test_every_truncation_keeps_every_whole_message() -> None:
    messages = [message(0), message(1), message(2)]
    data = b"".join(messages)
    bounds = [sum(map(len, messages[:count])) for count in range(4)]
    for length in range(len(data)):
        found = scan(data[:length])
        whole = sum(bound <= length for bound in bounds[1:])
        assert numbers(data[:length]) == list(range(whole))
        assert found.tail == ("open" if length in bounds else "torn")


def test_every_bit_flip_is_found_and_costs_its_message_only() -> None:
    messages = [message(0), message(1), message(2)]
    data = b"".join(messages)
    owner = [number for number, text in enumerate(messages) for _ in text]
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            assert numbers(bytes(changed)) == [n for n in range(3) if n != owner[place]]


def test_damage_between_messages_is_a_gap_and_at_the_end_damage() -> None:
    first, second, third = message(0), bytearray(message(1)), message(2)
    second[-1] ^= 1
    found = scan(first + second + third)
    assert found.parts[1] == Gap(len(first), len(first) + len(second))
    assert scan(first + second).tail == "damaged"
    assert scan(first + b"something else altogether").tail == "damaged"


def test_inserted_and_removed_bytes_cost_one_message() -> None:
    first, second, third = message(0), message(1), message(2)
    assert numbers(first + second[:20] + b"xyz" + second[20:] + third) == [0, 2]
    assert numbers(first + second[:20] + second[25:] + third) == [0, 2]


def test_a_text_that_looks_like_a_seal_is_no_message() -> None:
    lure = blank_seal(7, 1).encode()
    data = message(0, lure) + message(1, b"EMSEAL number=" + lure)
    assert numbers(data) == [0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_garbage_holds_no_message(seed: int) -> None:
    generator = random.Random(seed)
    garbage = generator.randbytes(500) + b"\xff" * 500
    assert numbers(garbage) == []
    assert numbers(garbage + message(3) + garbage) == [3]


def test_a_message_without_a_place_for_the_seal_is_refused() -> None:
    with pytest.raises(ValueError, match="no blank seal"):
        seal(b"\xff\xff\xff\xff nothing here")

from __future__ import annotations

import random

import pytest

from entropy_monitor.store.framing import END, SEAL_LENGTH, Gap, blank_seal, scan, seal
from entropy_monitor.store.message_walk import MessageWalk, Placed

PREFIX = b"\xff\xff\xff\xff"


def message(number: int, body: bytes = b"body" * 40) -> bytes:
    """A message of Arrow's outer form: mark, length of its metadata, metadata with a seal, body."""
    metadata = b"...." + blank_seal(number, 0xABCD).encode() + b"...."
    return seal(PREFIX + len(metadata).to_bytes(4, "little") + metadata + body)


MESSAGES = [message(0, b""), *(message(n) for n in range(1, 6)), message(6, b"")]
DATA = b"".join(MESSAGES)


def walked(path, data, walk=None):
    """What is found, as (number, start, stop) and gaps, and what follows it."""
    path.write_bytes(data)
    walk = walk or MessageWalk()
    with path.open("rb") as file:
        assert walk.is_of(file)
        found = list(walk.advance(file))
    for each in found:
        if isinstance(each, Placed):
            assert data[each.start : each.stop].startswith(each.head)
    parts = [(f.number, f.start, f.stop) if isinstance(f, Placed) else f for f in found]
    return parts, walk.tail, walk.tail_size


def scanned(data):
    found = scan(data)
    parts = [p if isinstance(p, Gap) else (p.number, p.start, p.stop) for p in found.parts]
    return parts, found.tail, len(data) - found.stop


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


@pytest.fixture(params=[1 << 16, SEAL_LENGTH, 7], ids="window={}".format, autouse=True)
def window(request, monkeypatch):
    monkeypatch.setattr("entropy_monitor.store.message_walk._WINDOW", request.param)


def test_messages_and_what_follows_them(path):
    for tail in (b"", END, END + b"x", PREFIX, b"noise", DATA[:30]):
        assert walked(path, DATA + tail) == scanned(DATA + tail)


def test_of_every_truncation_it_finds_what_a_scan_finds(path):
    for length in range(0, len(DATA), 3):
        assert walked(path, DATA[:length]) == scanned(DATA[:length])


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_wrong_with_places_it_finds_what_a_scan_finds(path, seed):
    """Bytes that are inserted or missing, heads that are overwritten; checksums decide."""
    generator = random.Random(seed)
    bounds = [sum(map(len, MESSAGES[:count])) for count in range(len(MESSAGES))]
    for _ in range(60):
        at = generator.choice(bounds) + generator.randrange(20)
        noise = generator.choice([b"", b"abc", END, generator.randbytes(50), MESSAGES[2][:200], MESSAGES[3]])
        data = DATA[:at] + noise + DATA[at + generator.choice([0, 1, 30, 150]) :]
        found, tail, size = walked(path, data)
        exact = scanned(data)
        believed = [f for f in found if isinstance(f, tuple) and f not in exact[0]]
        for number, start, stop in believed:  # in the right place, and not what was written
            assert (start in data_bounds(data), stop - start) == (True, len(MESSAGES[number]))
        if not believed:
            assert (found, tail, size) == exact


def data_bounds(data):
    return [at for at in range(len(data)) if data.startswith(PREFIX, at)]


@pytest.mark.parametrize("word", [b"number=", b"start=", b"length="])
@pytest.mark.parametrize("digit", range(8))
def test_a_seal_that_lies_about_its_message_is_not_believed(path, word, digit):
    at = len(MESSAGES[0]) + len(MESSAGES[1]) + MESSAGES[2].index(word) + len(word) + digit
    changed = bytearray(DATA)
    changed[at] = ord("e") if changed[at] != ord("e") else ord("1")
    assert walked(path, bytes(changed)) == scanned(bytes(changed))


def test_a_changed_body_is_believed_until_it_is_read(path):
    changed = bytearray(DATA)
    changed[len(MESSAGES[0]) + len(MESSAGES[1]) - 1] ^= 1
    assert walked(path, bytes(changed)) == scanned(DATA)


def test_a_changed_schema_is_not_believed(path):
    changed = bytearray(DATA)
    changed[MESSAGES[0].index(b"schema=") + 8] ^= 1
    assert walked(path, bytes(changed)) == scanned(bytes(changed))


def test_it_goes_on_where_it_ended(path):
    walk, found = MessageWalk(), []
    for length in [*range(0, len(DATA), 100), len(DATA)]:
        parts, _, _ = walked(path, DATA[:length], walk)
        found += parts
    assert found == scanned(DATA)[0]


def test_another_file_of_the_same_name_is_told(path):
    walk = MessageWalk()
    walked(path, DATA, walk)
    for other, same in (
        (DATA, True),
        (DATA + END, True),
        (DATA[:-1], False),
        (b"", False),
        (bytes(len(DATA) + 9), False),
        (DATA[: -len(MESSAGES[-1])] + message(6, b"other body") + DATA, False),
    ):
        path.write_bytes(other)
        with path.open("rb") as file:
            assert walk.is_of(file) is same

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from entropy_monitor.store import documents

PAYLOAD = {"model": {"ü": [1, 2]}, "rate": float("inf"), "empty": {}}


def test_a_document_comes_back_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    documents.create(path, PAYLOAD)
    assert documents.read(path) == PAYLOAD
    documents.replace(path, {"new": 1})
    assert documents.read(path) == {"new": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_create_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        documents.create(path, PAYLOAD)
    assert path.read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_of_several_at_once_one_creates_it(tmp_path: Path) -> None:
    barrier = threading.Barrier(6)
    won: list[int] = []

    def attempt(number: int) -> None:
        barrier.wait()
        try:
            documents.create(tmp_path / "x.json", {"winner": number})
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [documents.read(tmp_path / "x.json")["winner"]] == won


def test_create_is_exclusive_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no hard links")

    monkeypatch.setattr(os, "link", no_links)
    documents.create(tmp_path / "x.json", PAYLOAD)
    assert documents.read(tmp_path / "x.json") == PAYLOAD
    with pytest.raises(FileExistsError):
        documents.create(tmp_path / "x.json", {})


def test_every_bit_flip_and_truncation_is_found_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    documents.create(path, PAYLOAD)
    data = path.read_bytes()
    found = []
    variants = [data[:length] for length in range(len(data))]
    for place in range(len(data)):
        for bit in (0, 3, 5, 7):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            variants.append(bytes(changed))
    for variant in variants:
        path.write_bytes(variant)
        try:
            assert documents.read(path) == PAYLOAD
        except documents.DamagedDocumentError as error:
            found.append(str(error))
    assert len(found) > 0.9 * len(variants)
    assert all("x.json" in text for text in found)


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b"{}", b'{"crc32": 1}'])
def test_what_is_no_document_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(documents.DamagedDocumentError, match=r"x\.json"):
        documents.read(path)

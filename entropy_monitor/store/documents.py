"""Small JSON documents with a checksum, written so that they are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from entropy_monitor.store.plain import from_json, to_json

_CHECKSUM = "crc32"
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class DamagedDocumentError(ValueError):
    """The document's text is not what was written."""


def create(path: Path, payload: Mapping[str, object]) -> None:
    """Write a document that must not exist yet; of several at once, exactly one succeeds.

    Raises:
        FileExistsError: there is one already; it is left as it is.
    """
    data = _encode(payload)
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # No hard links here (some network and FUSE mounts): still exclusive, not atomic.
            with path.open("xb") as file:
                _write_durably(file.fileno(), data)
    _sync_folder(path.parent)


def replace(path: Path, payload: Mapping[str, object]) -> None:
    """Write a document, or put it in the place of its earlier version in one move."""
    with _temporary(path, _encode(payload)) as temporary:
        temporary.replace(path)
    _sync_folder(path.parent)


def read(path: Path) -> dict[str, Any]:
    """The document's payload.

    Raises:
        DamagedDocumentError: it is no JSON object, or its checksum does not fit.
        OSError: it cannot be read.
    """
    try:
        payload = from_json(path.read_bytes().decode())
    except ValueError as error:
        raise DamagedDocumentError(f"{path.name} is not valid JSON ({error})") from error
    if not isinstance(payload, dict):
        raise DamagedDocumentError(f"{path.name} holds no JSON object")
    stated = payload.pop(_CHECKSUM, None)
    actual = _checksum(payload)
    if stated != actual:
        raise DamagedDocumentError(
            f"{path.name} was changed after it was written (checksum {actual}, stated {stated})"
        )
    return payload


def _encode(payload: Mapping[str, object]) -> bytes:
    # Through JSON and back first, so that the checksum is over what a reader will see.
    seen = from_json(to_json(payload))
    return (to_json({**seen, _CHECKSUM: _checksum(seen)}, indent=1) + "\n").encode()


def _checksum(payload: Mapping[str, object]) -> str:
    return f"{zlib.crc32(to_json(payload).encode()):08x}"


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            _write_durably(file.fileno(), data)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_durably(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    # A new name is durable only once its folder is; not every file system lets a folder be synced.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

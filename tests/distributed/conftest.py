"""Processes to train on, started once for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("pool") / "meeting")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Two processes, for what takes long."""
    pool = Pool(tmp_path_factory.mktemp("pair") / "meeting", 2)
    yield pool
    pool.close()

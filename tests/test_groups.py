"""Tests that share a costly fixture run in one process: pytest-xdist must know of their groups."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("groups")
def test_the_workers_know_of_groups(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("loadgroup", default=False):
        # pytest 9.2 keeps ids in another place than that in which pytest-xdist 3.8 puts the group's name.
        assert request.node.nodeid.endswith("@groups")

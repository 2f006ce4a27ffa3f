from __future__ import annotations

from typing import get_args

from entropy_monitor.records import SEVERITIES, Severity, severity_rank


def test_severities_are_ranked_from_the_mildest() -> None:
    assert set(SEVERITIES) == set(get_args(Severity))
    assert [severity_rank(severity) for severity in ("info", "warning", "severe")] == [0, 1, 2]
    assert severity_rank("dire") == -1

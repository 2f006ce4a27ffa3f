from __future__ import annotations

import json
import math

import pytest

from entropy_monitor.analyzer.evidence import Evidence
from entropy_monitor.analyzer.loss import LossTrack
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.slots import HeadIndex
from entropy_monitor.records import Record
from tests.analyzer.series import keys, record


class Table:
    """Evidence with what it reads from."""

    def __init__(self) -> None:
        self.index, self.loss, self.evidence = HeadIndex(), LossTrack(0.3), Evidence()

    def read(self, each: Record) -> Reading:
        self.loss.update(each)
        reading = Reading.of(each, self.index, self.loss, 0.5)
        self.evidence.remember(reading)
        return reading


def test_figures_and_growth_since_the_first_reading() -> None:
    table = Table()
    table.read(record(3, keys(1, 2), share=0.9, sigma_qk=0.5, max_logit=2.0, loss=2.5))
    reading = table.read(
        record(
            9, keys(1, 2), share=[0.9, 0.1], sigma_qk=[0.5, 6.0], max_logit=[2.0, 50.0], floor_row=0.2,
            loss=2.0,
            layers={"other": {"grad_linf": 9.0}, "blocks.0.attn": {"grad_linf": 0.25, "update_sigma": 0.5}},
        )
    )  # fmt: skip
    evidence = table.evidence.gather(reading, 1)
    assert evidence == {
        "worst_head": 1, "call": 0, "loss": 2.0, "loss_at_start": 2.5,
        "entropy": pytest.approx(0.1 * math.log(16)), "entropy_se": 0.0,
        "max_entropy": pytest.approx(math.log(16)),
        "entropy_share": pytest.approx(0.1), "share_at_start": pytest.approx(0.9), "start_step": 3,
        "max_logit": 50.0, "max_logit_at_start": 2.0, "max_logit_growth": 25.0,
        "sigma_qk": 6.0, "sigma_qk_at_start": 0.5, "sigma_qk_growth": 12.0,
        "floor_row": pytest.approx(0.2), "grad_linf": 0.25, "update_sigma": 0.5,
        "grad_linf_at_start": 0.25, "grad_linf_growth": 1.0,
    }  # fmt: skip
    json.dumps(evidence, allow_nan=False)


def test_what_is_unknown_is_absent() -> None:
    table = Table()
    reading = table.read(record(0, keys(1, 1), max_logit=math.inf, entropy=math.nan))
    assert table.evidence.gather(reading, 0).keys() == {"worst_head", "call", "max_entropy", "entropy_se"}
    assert table.evidence.gather(reading, None) == {}


def test_a_first_reading_that_is_not_finite_is_not_kept() -> None:
    table = Table()
    table.read(record(0, keys(1, 1), entropy=math.nan, max_logit=math.inf))
    reading = table.read(record(5, keys(1, 1), share=0.5, max_logit=3.0))
    evidence = table.evidence.gather(reading, 0)
    assert (evidence["start_step"], evidence["max_logit_at_start"]) == (5, 3.0)


def test_growth_of_a_negative_start_is_not_told() -> None:
    table = Table()
    table.read(record(0, keys(1, 1), max_logit=-4.0))
    reading = table.read(record(1, keys(1, 1), max_logit=8.0))
    assert "max_logit_growth" not in table.evidence.gather(reading, 0)


def test_a_head_that_was_not_measured_now_keeps_its_identity() -> None:
    table = Table()
    table.read(record(0, keys(1, 2)))
    reading = table.read(record(1, keys(1, 1)))
    evidence = table.evidence.gather(reading, 1)
    assert (evidence["worst_head"], evidence["share_at_start"]) == (1, pytest.approx(0.9))
    assert "entropy" not in evidence

from __future__ import annotations

import math

import numpy as np
import pytest

from entropy_monitor.analyzer import Analyzer
from entropy_monitor.analyzer import evidence as gathered
from entropy_monitor.analyzer.registry import DETECTORS
from entropy_monitor.dashboards.evidence_text import _COUNTS, _LABELS, evidence_rows
from tests.analyzer.series import fall, keys, play, record

LAYER = {"grad_linf": 0.5, "grad_l2": 1.0, "update_sigma": 0.1, "update_entropy": 1.0}
KNOWN = dict.fromkeys(("floor_activation", "floor_weights", "sigma_q", "sigma_k", "sigma_qk"), 1.0)


def trouble():
    """Records of five runs, one in each kind of trouble."""
    layers = {"blocks.0.attn": LAYER}
    shares = [*[0.9] * 10, *np.geomspace(0.9, 0.001, 30)]
    yield fall(shares, loss=2.0, layers=layers, floor_row=0.0, **(KNOWN | dict.fromkeys(KNOWN, 0.001)))
    yield [record(10 * i, keys(1, 4), max_logit=2.0 * 1.3**i, loss=2.0, layers=layers) for i in range(40)]
    yield [record(0, keys(1, 2), loss=2.0), record(10, keys(1, 2), entropy=math.nan, loss=2.0)]
    yield [record(i, keys(1, 2), entropy=2.0, floor_row=2.5) for i in range(5)]
    g = np.random.default_rng(0)
    yield [record(10 * i, keys(3, 2), share=0.995, loss=2.3 + 0.03 * g.standard_normal()) for i in range(200)]


def evidence_of_all():
    alerts = [event.alert for records in trouble() for event in play(Analyzer(), records)]
    assert {alert.kind for alert in alerts} == {detector.kind for detector in DETECTORS}
    return [alert.evidence for alert in alerts]


def test_every_figure_that_the_analyzer_gives_has_a_label():
    given = {key for evidence in evidence_of_all() for key in evidence}
    assert given <= _LABELS.keys()
    always = {
        *gathered._HEAD_FIGURES,
        *gathered._LAYER_FIGURES,
        "entropy_share",
        "opened_share",
        "start_step",
    }
    always |= {f"{name}_at_start" for name in (*gathered._FROM_START, "grad_linf", "loss")}
    always |= {f"{name}_growth" for name in ("sigma_qk", "max_logit", "grad_linf")}
    assert always <= _LABELS.keys()
    assert _LABELS.keys() >= _COUNTS
    # And no label stands for something that nobody gives.
    assert _LABELS.keys() <= given | always


def test_every_alert_says_its_figures_in_words():
    for evidence in evidence_of_all():
        rows = evidence_rows(evidence)
        first = "call" in evidence and evidence["call"] == 0
        assert len(rows) == len(evidence) - first
        assert all(label and text for label, text in rows)


@pytest.mark.parametrize(
    ("key", "value", "row"),
    [
        ("entropy", 0.0834, ("entropy (nats)", "0.0834")),
        ("entropy_share", 0.0349, ("entropy / maximum", "3.5 %")),
        ("share_at_start", 0.9, ("entropy / maximum at the start", "90 %")),
        ("sigma_qk_growth", 12.04, ("σ(W_K W_Qᵀ) / its first value", "12.0×")),
        ("max_logit", 1234.5, ("largest logit", "1,234")),
        ("grad_linf", 1e-7, ("largest attention gradient", "1.0e-07")),
        ("worst_head", 3, ("worst head", "3")),
        ("start_step", 12000.0, ("step of the first reading", "12,000")),
        ("layers", 12.0, ("layers", "12")),
        ("call", 1, ("attention call", "1")),
        ("of_another_version", 12345, ("of another version", "12,345")),
        ("of_another_version", "text <b>", ("of another version", "text <b>")),
        ("loss", math.nan, ("loss", "nan")),
        ("max_logit", math.inf, ("largest logit", "inf")),
        ("entropy_share", math.nan, ("entropy / maximum", "nan %")),
        ("sigma_qk_growth", math.inf, ("σ(W_K W_Qᵀ) / its first value", "inf×")),
        ("worst_head", math.inf, ("worst head", "inf")),
        ("call", -math.inf, ("attention call", "-inf")),
        ("layers", 10**400, ("layers", str(10**400))),
    ],
)
def test_figures_in_words(key, value, row):
    ((label, text),) = evidence_rows({key: value})
    assert (label, text.replace(",", "") if value == 10**400 else text) == row


@pytest.mark.parametrize("value", [None, True, [1, 2], {"a": 1}, [[0.5]]])
def test_what_is_no_figure_is_left_out(value):
    assert evidence_rows({"map": value, "share": value}) == []


def test_a_call_that_is_the_first_is_left_out():
    assert evidence_rows({"call": 0, "worst_head": 0}) == [("worst head", "0")]

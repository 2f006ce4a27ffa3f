"""The analyzer as a whole, and what every detector in the registry must hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from entropy_monitor.analyzer import Analyzer, Thresholds
from entropy_monitor.analyzer.detector import Detector
from entropy_monitor.analyzer.loss import LossTrack
from entropy_monitor.analyzer.reading import Reading
from entropy_monitor.analyzer.registry import DETECTORS
from entropy_monitor.analyzer.slots import HeadIndex
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import HEADS, AlertEvent, Record
from tests.analyzer.series import digits, keys, play, record


def through_json(analyzer: Analyzer) -> Analyzer:
    restored = Analyzer(analyzer.thresholds)
    restored.load_state_dict(json.loads(json.dumps(analyzer.state_dict(), allow_nan=False)))
    return restored


def troubled(seed: int, records: int = 80) -> list[Record]:
    """Heads that come and go, fall, explode, turn NaN and recover: everything at once, at random."""
    rng = np.random.default_rng(seed)
    heads = keys(3, 3, calls=2)
    share, logit = np.full(len(heads), 0.95), np.full(len(heads), 1.0)
    made = []
    for i in range(records):
        jump = rng.random(len(heads)) < 0.08
        share = np.where(jump, rng.choice([0.01, 0.05, 0.6, 0.99], len(heads)), share)
        logit = np.where(jump, rng.choice([1.0, 60.0, 400.0, 3000.0], len(heads)), logit * 1.02)
        entropy = share * math.log(16)
        entropy[rng.random(len(heads)) < 0.01] = math.nan
        present = np.flatnonzero(rng.random(len(heads)) < 0.9)
        made.append(
            record(
                10 * i,
                [heads[j] for j in present],
                entropy=entropy[present],
                max_logit=logit[present],
                floor_row=np.where(rng.random(len(present)) < 0.01, 2.5, 0.0),
                sigma_qk=np.sqrt(logit[present]),
                loss=None if rng.random() < 0.1 else rng.choice([2.3, 1.5, math.nan], p=[0.8, 0.17, 0.03]),
            )
        )
    return made


def fragile() -> list[Record]:
    """Records that hold nothing, nothing known, nothing finite, nothing read."""
    heads = keys(2, 2)
    unknown: Any = {c.name: math.nan for c in HEADS.columns if c.dtype == "float32"}
    return [
        Record(0, {}, {}, {}),
        Record(1, HEADS.empty()),
        record(2, heads),
        record(3, heads, **unknown),
        record(4, heads, entropy=math.inf, max_logit=-math.inf, max_entropy=-1.0, loss=math.inf),
        record(5, heads, rows_read=0, entropy=math.nan, max_logit=math.nan),
        record(6, heads[:1], max_entropy=0.0, entropy=0.0),
        record(7, [*heads, ("late", 0, 0)]),
    ]


def drive(detector: Detector, records: list[Record], index: HeadIndex, loss: LossTrack) -> list[Any]:
    found = []
    for each in records:
        loss.update(each)
        found.append(detector.update(Reading.of(each, index, loss, 0.5)))
    return found


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: d.kind)
class TestEveryDetector:
    def test_survives_what_is_empty_null_or_not_finite(self, detector: type[Detector]) -> None:
        with np.errstate(all="raise"):
            drive(detector(Thresholds()), fragile(), HeadIndex(), LossTrack(0.3))

    def test_keeps_its_finding_over_an_empty_record(self, detector: type[Detector]) -> None:
        one, index, loss = detector(Thresholds()), HeadIndex(), LossTrack(0.3)
        before = drive(one, troubled(0), index, loss)[-1]
        (after,) = drive(one, [Record(10_000, HEADS.empty())], index, loss)
        assert after == before

    @pytest.mark.parametrize("seed", range(3))
    def test_state_midway_goes_on_as_unbroken(self, detector: type[Detector], seed: int) -> None:
        records = troubled(seed)
        whole, index, loss = detector(Thresholds()), HeadIndex(), LossTrack(0.3)
        drive(whole, records[:37], index, loss)
        resumed = detector(Thresholds())
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
        index_2, loss_2 = HeadIndex(), LossTrack(0.3)
        index_2.load_state_dict(index.state_dict())
        loss_2.load_state_dict(loss.state_dict())
        assert drive(resumed, records[37:], index_2, loss_2) == drive(whole, records[37:], index, loss)

    def test_at_most_one_finding_a_layer_with_words_and_json_figures(self, detector: type[Detector]) -> None:
        one = detector(Thresholds())
        for findings in drive(one, troubled(1), HeadIndex(), LossTrack(0.3)):
            assert len({finding.layer for finding in findings}) == len(findings)
            for finding in findings:
                json.dumps(dict(finding.figures), allow_nan=False)
                words = one.describe(finding, dict(finding.figures))
                assert words.title
                assert words.message.endswith(".")
                assert words.advice.endswith(".")


def test_kinds_are_unique() -> None:
    assert len({detector.kind for detector in DETECTORS}) == len(DETECTORS) == 5


@pytest.mark.parametrize("seed", range(5))
def test_resuming_anywhere_gives_the_events_of_an_unbroken_run(seed: int) -> None:
    records = troubled(seed)
    unbroken = Analyzer()
    expected = play(unbroken, records)
    assert len(expected) > 20
    broken, events = Analyzer(), []
    for i, each in enumerate(records):
        if i % 7 == seed:
            broken = through_json(broken)
        events += broken.update(each)
    assert events == expected
    assert broken.open_alerts == unbroken.open_alerts


@pytest.mark.parametrize("seed", range(5))
def test_the_life_of_every_alert_is_in_order(seed: int) -> None:
    analyzer = Analyzer()
    lives: dict[str, list[AlertEvent]] = {}
    for event in play(analyzer, troubled(seed)):
        lives.setdefault(event.alert.id, []).append(event)
    for life in lives.values():
        names = [event.event for event in life]
        assert names[0] == "opened"
        assert names[1:-1] == ["updated"] * len(names[1:-1])
        assert len({(event.alert.kind, event.alert.layer) for event in life}) == 1
        for event in life:
            json.dumps(dict(event.alert.evidence), allow_nan=False)
            assert event.alert.opened <= event.step
            if event.alert.layer and event.event != "closed":
                assert {"worst_head", "call"} <= event.alert.evidence.keys()
    is_open = {key for key, life in lives.items() if life[-1].event != "closed"}
    assert {alert.id for alert in analyzer.open_alerts} == is_open
    spots = [(alert.kind, alert.layer) for alert in analyzer.open_alerts]
    assert len(set(spots)) == len(spots)


def test_attached_evidence_survives_a_restart() -> None:
    analyzer = Analyzer()
    events = play(analyzer, digits("collapse")[:12])
    alert = analyzer.attach(events[0].alert.id, map=np.eye(2))
    assert alert.evidence["map"] == [[1.0, 0.0], [0.0, 1.0]]
    assert alert in through_json(analyzer).open_alerts


def test_a_state_of_another_layout_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"version 99, this package reads 1: start the analyzer afresh"
    ):
        Analyzer().load_state_dict({"version": 99})


def test_a_detector_that_the_state_does_not_know_starts_afresh() -> None:
    analyzer = Analyzer()
    state = analyzer.state_dict()
    del state["detectors"]["logit_explosion"]
    Analyzer().load_state_dict(state)


def test_records_are_left_as_they_were() -> None:
    each = troubled(0)[0]
    before = {name: list(column) for name, column in each.heads.items()}
    Analyzer().update(each)
    assert json.dumps(before, default=str) == json.dumps(
        {name: list(column) for name, column in each.heads.items()}, default=str
    )


def test_numpy_is_all_that_the_analyzer_itself_imports() -> None:
    """The package is entered without its __init__, which may import torch for other rooms."""
    code = (
        "import sys, types, pathlib, importlib.util as u\n"
        "root = pathlib.Path(u.find_spec('entropy_monitor').submodule_search_locations[0])\n"
        "package = types.ModuleType('entropy_monitor'); package.__path__ = [str(root)]\n"
        "sys.modules['entropy_monitor'] = package\n"
        "import entropy_monitor.analyzer\n"
        "bad = {'torch', 'pandas', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

from __future__ import annotations

import numpy as np
import pytest

from entropy_monitor.dashboards.verdict import advice, digest, headline, history, percent
from entropy_monitor.records import HEADS, SCALARS, Record
from entropy_monitor.store import FollowedRun, RunWriter
from tests.dashboards.run_dirs import as_alert, written
from tests.run_factory import FakeRun, alert, alert_frame, make_run
from tests.store.samples import info


@pytest.fixture
def summed(tmp_path):
    """Sums up a made-up run, from its directory."""

    def sum_up(run: FakeRun, **options):
        path = written(run, tmp_path / f"{run.name}-{len(list(tmp_path.iterdir()))}")
        alerts = [as_alert(row) for row in run.alerts.to_dict("records")]
        return digest(run.name, FollowedRun(path, **options), alerts)

    return sum_up


def test_a_sound_run(summed):
    found = summed(make_run(steps=12, layers=3, heads=2))
    assert found.verdict == "sound"
    assert (found.first_step, found.last_step, found.measured, found.open_alerts) == (0, 119, 12, 0)
    assert found.final_loss == pytest.approx(np.mean([2.0 * 0.99**s for s in range(110, 120)]))
    assert found.lowest_share.value == pytest.approx(0.87)
    assert (found.lowest_share.layer, found.lowest_share.head, found.lowest_share.row) == ("b.2.attn", 1, 5)
    assert found.sigma_growth.value == pytest.approx(1.0)
    assert found.end_share == pytest.approx(0.885)
    assert "no warning and no severe alert in 12 measured steps" in found.headline
    assert found.words.startswith(found.headline)
    assert found.lowest_share.where in found.words


def test_a_collapsing_run(summed):
    found = summed(make_run("bad", collapsing=True, steps=6))
    assert found.verdict == "trouble"
    assert found.alerts == {"severe": 1, "warning": 0, "info": 0}
    assert found.open_alerts == 1
    assert (found.lowest_share.layer, found.lowest_share.step) == ("b.0.attn", 50)
    assert found.lowest_share.value == pytest.approx(0.89 * 0.5**5)
    assert found.sigma_growth.value == pytest.approx(32.0)
    assert found.largest_logit.value == pytest.approx(96.0)
    assert found.headline == "In trouble since step 30: Attention of b.0.attn is collapsing."
    assert "1 alert, 1 still open" in found.words


def test_growth_is_from_a_heads_own_first_known_value_whatever_the_order_of_rows(summed):
    run = make_run(layers=1, heads=2, steps=4)
    heads = run.heads.copy()
    heads["sigma_qk"] = [np.nan, 100.0, 2.0, 100.0, 3.0, 110.0, 8.0, 90.0]
    growth = summed(run.but(heads=heads.sample(frac=1.0, random_state=3))).sigma_growth
    assert growth.value == pytest.approx(4.0)
    assert (growth.head, growth.step) == (0, 30)


def test_growth_has_no_start_where_a_norm_was_zero_or_infinite(summed):
    run = make_run(layers=1, heads=2, steps=3)
    heads = run.heads.assign(sigma_qk=[0.0, np.inf, 2.0, np.inf, 3.0, np.inf])
    assert summed(run.but(heads=heads)).sigma_growth.value == pytest.approx(1.5)
    assert summed(run.but(heads=run.heads.assign(sigma_qk=np.nan))).sigma_growth is None


def test_warnings_alone_are_worth_a_look(summed):
    found = summed(make_run().but(alerts=alert_frame([alert(severity="warning", closed=90)])))
    assert found.verdict == "watch"
    assert found.words.startswith("Worth a look since step 30")
    assert "1 alert, all closed since" in found.words


def test_an_info_alert_leaves_a_run_sound(summed):
    assert summed(make_run().but(alerts=alert_frame([alert(severity="info")]))).verdict == "sound"


@pytest.mark.parametrize("severity", [None, "info", "of another version"])
def test_a_loss_that_breaks_is_trouble_without_any_alert(summed, severity):
    run = make_run()
    scalars = run.scalars.copy()
    scalars.loc[40:, "value"] = np.nan
    found = summed(
        run.but(scalars=scalars, alerts=alert_frame([alert(severity=severity)] if severity else []))
    )
    assert (found.verdict, found.broken_loss) == ("trouble", 40)
    assert found.headline == "The loss was not finite at step 40."
    assert found.final_loss is None  # what was before it broke is not what the run ended at


def test_a_damaged_run_is_not_said_to_be_sound(tmp_path):
    run = written(make_run(), tmp_path / "run")
    (run / "alerts-000-000.jsonl").unlink()
    found = digest("run", FollowedRun(run), [])
    assert (found.verdict, found.damaged) == ("watch", 1)
    assert found.headline == "Worth a look: no warning and no severe alert in what could be read."
    assert "A piece of this run could not be read." in found.words


def test_an_empty_run_is_unknown(summed):
    found = summed(FakeRun())
    assert found.verdict == "unknown"
    assert "Nothing was measured" in found.words == found.headline
    assert found.first_step is found.last_step is found.final_loss is found.lowest_share is None
    assert found.largest_logit is found.sigma_growth is found.end_share is None


def test_a_run_of_which_only_the_loss_is_known(tmp_path):
    writer = RunWriter(tmp_path)
    writer.open(info())
    scalars = {"step": np.arange(5), "name": ["loss"] * 5, "value": np.arange(5.0)}
    writer.log(Record(4, HEADS.empty(), scalars=SCALARS.empty() | scalars))
    writer.close()
    found = digest("a", FollowedRun(tmp_path), [])
    assert (found.verdict, found.final_loss, found.first_step, found.last_step) == ("unknown", 2.0, None, 4)


def test_readings_that_are_not_finite_are_left_out(summed):
    run = make_run(layers=1, heads=1, steps=4)
    heads = run.heads.assign(entropy=[np.nan, np.inf, 1.0, -np.inf], max_logit=[np.inf, 5.0, np.nan, -np.inf])
    found = summed(run.but(heads=heads))
    assert (found.lowest_share.step, found.end_share) == (20, None)
    assert (found.largest_logit.value, found.largest_logit.step) == (5.0, 10)
    unread = summed(run.but(heads=run.heads.assign(entropy=np.inf, max_logit=np.nan)))
    assert unread.lowest_share is unread.largest_logit is None


def test_of_equal_readings_the_first_is_named(summed):
    assert summed(make_run(layers=1, heads=2)).largest_logit.step == 0


def test_a_run_that_is_shown_in_blocks(summed, monkeypatch):
    monkeypatch.setattr("entropy_monitor.store.levels.BLOCK", 4)
    run = make_run("bad", collapsing=True, steps=14)
    exact, blocks = summed(run), summed(run, most_cells=20)
    for name in ("verdict", "first_step", "last_step", "measured", "final_loss", "alerts"):
        assert getattr(blocks, name) == getattr(exact, name)
    assert blocks.last_step == 139
    assert blocks.lowest_share.value == exact.lowest_share.value
    assert blocks.largest_logit.value == exact.largest_logit.value
    assert blocks.sigma_growth.value == pytest.approx(2.0**13 / np.mean([1, 2, 4, 8]))


def test_the_last_step_of_a_run_without_scalars_that_ends_with_a_block(summed, monkeypatch):
    monkeypatch.setattr("entropy_monitor.store.levels.BLOCK", 4)
    run = make_run(steps=8)
    found = summed(run.but(scalars=run.scalars[:0]), most_cells=20)
    assert (found.last_step, found.measured) == (70, 8)


def given(*rows):
    return [as_alert(row) for row in alert_frame(rows).to_dict("records")]


def test_history_is_in_order_of_opening_the_worse_first():
    first = ("a", given(alert(opened=50), alert(opened=10, closed=40)))
    second = ("b", given(alert(opened=50, severity="warning")))
    events = history([second, first])
    assert [(e.run, e.opened, e.closed) for e in events] == [("a", 10, 40), ("a", 50, None), ("b", 50, None)]


def test_advice_is_given_once_the_worst_first_from_the_earliest_step():
    alerts = given(
        alert(severity="warning", opened=5, title="W", advice="Add warmup."),
        alert(opened=60, title="late", advice="Go back before step 60."),
        alert(opened=30, title="early", advice="Go back before step 30."),
        alert(opened=90, title="silent", advice=" "),
    )
    assert [(item.text, item.reasons) for item in advice([("a", alerts)])] == [
        ("Go back before step 30.", ("a: early", "a: late")),
        ("Add warmup.", ("a: W",)),
    ]


def test_advice_with_steps_is_each_runs_own():
    runs = [
        (name, given(alert(advice=f"Go back before step {step}."), alert(advice="Warm up.")))
        for name, step in (("a", 30), ("b", 400))
    ]
    assert [item.text for item in advice(runs)] == [
        "Go back before step 30.",
        "Warm up.",
        "Go back before step 400.",
    ]


def test_headlines(summed):
    sound, bad, empty = (
        summed(make_run("A b")),
        summed(make_run("Bad", collapsing=True)),
        summed(FakeRun("E")),
    )
    assert headline([sound]) == sound.headline
    assert headline([sound, sound]).startswith("All 2 runs are sound")
    assert headline([sound, bad, empty]) == "1 of 3 runs is sound. In trouble: Bad; Nothing measured: E."
    assert headline([bad, bad]).startswith("None of 2 runs are sound. In trouble: Bad, Bad")


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (0.0004, "< 0.1 %"), (0.004, "0.4 %"), (0.0349, "3.5 %"), (0.826, "83 %"), (1.0, "100 %")],
)
def test_percent(share, text):
    assert percent(share).replace("\N{NO-BREAK SPACE}", " ") == text

from __future__ import annotations

import numpy as np
import pytest

from entropy_monitor.dashboards.digest import advice, digest, headline, history, percent
from tests.run_factory import FakeRun, alert, alert_frame, make_run


def test_a_sound_run():
    summed = digest(make_run(steps=12, layers=3, heads=2))
    assert summed.verdict == "sound"
    assert (summed.last_step, summed.measured, summed.open_alerts) == (119, 12, 0)
    assert summed.final_loss == pytest.approx(np.mean([2.0 * 0.99**s for s in range(110, 120)]))
    assert summed.lowest_share.value == pytest.approx(0.87)
    assert (summed.lowest_share.layer, summed.lowest_share.head) == ("b.2.attn", 1)
    assert summed.sigma_growth.value == pytest.approx(1.0)
    assert summed.end_share == pytest.approx(0.885)
    assert "no warning and no severe alert in 12 measured steps" in summed.words
    assert summed.lowest_share.where in summed.words


def test_a_collapsing_run():
    summed = digest(make_run("bad", collapsing=True, steps=6))
    assert summed.verdict == "trouble"
    assert summed.alerts == {"severe": 1, "warning": 0, "info": 0}
    assert summed.open_alerts == 1
    assert (summed.lowest_share.layer, summed.lowest_share.step) == ("b.0.attn", 50)
    assert summed.lowest_share.value == pytest.approx(0.89 * 0.5**5)
    assert summed.sigma_growth.value == pytest.approx(32.0)
    assert summed.largest_logit.value == pytest.approx(96.0)
    assert summed.words.startswith("In trouble since step 30: Attention of b.0.attn is collapsing.")
    assert "1 alert, 1 still open" in summed.words


def test_growth_is_from_a_heads_own_first_known_value_whatever_the_order_of_rows():
    run = make_run(layers=1, heads=2, steps=4)
    heads = run.heads.copy()
    heads["sigma_qk"] = [np.nan, 100.0, 2.0, 100.0, 3.0, 110.0, 8.0, 90.0]
    shuffled = run.but(heads=heads.sample(frac=1.0, random_state=3))
    growth = digest(shuffled).sigma_growth
    assert growth.value == pytest.approx(4.0)
    assert (growth.head, growth.step) == (0, 30)


def test_warnings_alone_are_worth_a_look():
    run = make_run().but(alerts=alert_frame([alert(severity="warning", closed=90)]))
    summed = digest(run)
    assert summed.verdict == "watch"
    assert summed.words.startswith("Worth a look since step 30")
    assert "1 alert, all closed since" in summed.words


def test_an_info_alert_leaves_a_run_sound():
    assert digest(make_run().but(alerts=alert_frame([alert(severity="info")]))).verdict == "sound"


def test_a_loss_that_breaks_is_trouble_without_any_alert():
    run = make_run()
    scalars = run.scalars.copy()
    scalars.loc[40:, "value"] = np.nan
    summed = digest(run.but(scalars=scalars))
    assert (summed.verdict, summed.broken_loss) == ("trouble", 40)
    assert "The loss was not finite at step 40." in summed.words
    assert summed.final_loss == pytest.approx(np.mean([2.0 * 0.99**s for s in range(30, 40)]))


def test_an_empty_run_is_unknown():
    summed = digest(FakeRun())
    assert summed.verdict == "unknown"
    assert "Nothing was measured" in summed.words
    assert summed.last_step is summed.final_loss is summed.lowest_share is None
    assert summed.largest_logit is summed.sigma_growth is summed.end_share is None


def test_readings_that_are_not_finite_are_left_out():
    run = make_run(layers=1, heads=1, steps=3)
    heads = run.heads.assign(entropy=[np.nan, np.inf, 1.0], max_logit=[np.inf, 5.0, np.nan])
    summed = digest(run.but(heads=heads))
    assert summed.lowest_share.step == 20
    assert (summed.largest_logit.value, summed.largest_logit.step) == (5.0, 10)


def test_history_is_in_order_of_opening_the_worse_first():
    first = make_run("a").but(alerts=alert_frame([alert(opened=50), alert(opened=10, closed=40)]))
    second = make_run("b").but(alerts=alert_frame([alert(opened=50, severity="warning")]))
    events = history([second, first])
    assert [(e.run, e.opened, e.closed) for e in events] == [("a", 10, 40), ("a", 50, None), ("b", 50, None)]


def test_advice_is_given_once_the_worst_first_from_the_earliest_step():
    rows = [
        alert(severity="warning", opened=5, title="W", advice="Add warmup."),
        alert(opened=60, title="late", advice="Go back before step 60."),
        alert(opened=30, title="early", advice="Go back before step 30."),
        alert(opened=90, title="silent", advice=" "),
    ]
    given = advice([make_run("a").but(alerts=alert_frame(rows))])
    assert [(item.text, item.reasons) for item in given] == [
        ("Go back before step 30.", ("a: early", "a: late")),
        ("Add warmup.", ("a: W",)),
    ]


def test_advice_with_steps_is_each_runs_own():
    runs = [
        make_run(name).but(
            alerts=alert_frame([alert(advice=f"Go back before step {step}."), alert(advice="Warm up.")])
        )
        for name, step in (("a", 30), ("b", 400))
    ]
    assert [item.text for item in advice(runs)] == [
        "Go back before step 30.",
        "Warm up.",
        "Go back before step 400.",
    ]


def test_headlines():
    sound, bad, empty = (
        digest(make_run("A b")),
        digest(make_run("Bad", collapsing=True)),
        digest(FakeRun("E")),
    )
    assert headline([sound]) == sound.words
    assert headline([sound, sound]).startswith("All 2 runs are sound")
    assert headline([sound, bad, empty]) == "1 of 3 runs is sound. In trouble: Bad; Nothing measured: E."
    assert headline([bad, bad]).startswith("None of 2 runs are sound. In trouble: Bad, Bad")


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (0.0004, "< 0.1 %"), (0.004, "0.4 %"), (0.0349, "3.5 %"), (0.826, "83 %"), (1.0, "100 %")],
)
def test_percent(share, text):
    assert percent(share).replace("\N{NO-BREAK SPACE}", " ") == text

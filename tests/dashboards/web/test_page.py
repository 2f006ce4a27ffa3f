"""The page in a real browser, served by `serve`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from tests.dashboards.web.browser import Page
from tests.dashboards.web.conftest import Served, served
from tests.dashboards.web.written_runs import alert, begin, step, write_run

pytestmark = pytest.mark.xdist_group("chromium")


def test_at_first_sight_the_worst_run_and_its_worst_alert(page: Page, runs: Served) -> None:
    page.open(runs.address)
    page.says(".evidence", "Entropy collapse in blocks.1.attn")
    names = [element.text for element in page.all(".run-name")]
    assert names == ["collapsing", "sound", "begun", "newer"]
    assert page.one("h2#run-title").text.split("\n")[0].startswith("collapsing")
    assert "in trouble since step 20" in page.one(".lead").text.lower()
    assert page.one(".badge.trouble").text == "in trouble"
    page.says(".runs-table", "cannot be read")
    assert {trace["name"] for trace in page.drawn(".compare")} == {"collapsing", "sound"}
    assert max(page.drawn(".heads-map")[0]["z"][0]) > 0
    asked = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert asked
    assert all(name.startswith((runs.address, "data:", "blob:")) for name in asked)
    assert not page.all("[data-title^=Share]")  # plotly would send the chart to its maker's server


def test_a_click_on_an_alert_leads_to_its_evidence(page: Page, runs: Served) -> None:
    page.open(runs.at("run=collapsing"))
    page.click(".alert", "blocks.0.attn")
    page.says(".evidence", "Entropy collapse in blocks.0.attn")
    page.says(".evidence", "heads 0, 1")
    page.says(".evidence .todo", "Lower the learning rate.")
    page.says(".step-words", "step 40")
    page.says(".reading h5", "blocks.0.attn, head 1 at step 40")
    assert "largest logit" in page.one(".evidence-figures").text
    assert page.all(".alert[aria-current]")[0].text.startswith("warning")
    page.click(".alert", "blocks.1.attn")
    page.says(".evidence code", "em.sigma_reparam(model)")
    page.says("figcaption", "Attention map")
    assert page.drawn(".attention-map")[0]["z"] == pytest.approx(
        np.array([[1, 0, 0], [0.25, 0.75, 0], [0.125, 0.125, 0.75]]), abs=1e-4
    )
    page.says(".reading h5", "blocks.1.attn, head 2 at step 20")
    page.until(
        lambda: "alert=" in page.driver.current_url and "step=20" in page.driver.current_url, "the address"
    )


def test_everything_can_be_done_with_the_keyboard(page: Page, runs: Served) -> None:
    page.open(runs.at("run=collapsing"))
    page.says(".evidence", "Entropy collapse in blocks.1.attn")
    page.focus(".run-name", "sound")
    page.press(Keys.ENTER)
    page.says("h2#run-title", "sound")
    page.focus(".run-name", "collapsing")
    page.press(Keys.ENTER)
    page.says("h2#run-title", "collapsing")
    page.focus(".alert", "blocks.0.attn")
    page.press(Keys.ENTER)
    page.says(".evidence", "Entropy collapse in blocks.0.attn")
    page.says(".step-words", "step 40")
    page.focus(".slider input")
    page.press(Keys.ARROW_RIGHT)
    page.says(".step-words", "step 50")
    page.until(
        lambda: page.run("return document.querySelector('.heads-map .chart').ariaLabel").endswith("step 50"),
        "the map",
    )
    page.press(Keys.END)
    page.says(".step-words", "step 90 (newest)")
    page.focus(".heads-map")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    page.says(".reading h5", "blocks.1.attn, head 0 at step 90")
    page.focus(".head-panel select")
    page.press("blocks.0")
    page.says(".reading h5", "blocks.0.attn, head 0 at step 90")
    page.focus(".map-column select")
    page.press("alert")
    page.until(lambda: page.drawn(".heads-map")[0]["z"] == [[2, 2, 0], [0, 0, 3]], "the map of alerts")
    page.focus(".course select")
    page.focus(".layer-chooser summary")
    page.press(Keys.ENTER)
    page.focus(".layer-boxes input")


def test_what_is_written_meanwhile_arrives(page: Page, tmp_path: Path) -> None:
    writer = begin(tmp_path / "live")
    page.open(served(tmp_path).address)
    page.says(".empty", "Nothing has been measured yet")
    for number in (0, 10, 20):
        writer.log(step(number))
    page.says(".step-words", "step 20 (newest)")
    page.says("h2#run-title", "live")
    page.click(".head-panel select option", "blocks.0.attn")
    page.click(".heads-map")
    page.press(Keys.ARROW_RIGHT)
    page.until(lambda: page.one(".reading h5").text.endswith("at step 20"), "a head")
    chosen = page.one(".reading h5").text.split(" at ")[0]
    writer.log(step(30))
    writer.alert(alert(30))
    writer.close()
    write_run(tmp_path / "second")
    page.says(".step-words", "step 30 (newest)")
    page.says(".alert", "Entropy collapse in blocks.1.attn")
    assert "1 new alert" in page.run("return document.querySelector('[aria-live]').textContent")
    page.says(".reading h5", f"{chosen} at step 30")
    page.until(lambda: page.drawn(".course")[-1]["x"][-1] == 30, "the new step in the layers' course")
    page.says(".run-name", "second")
    page.until(lambda: not page.all(".badge.live"), "the run's end")


def test_a_link_leads_to_the_same_place(page: Page, runs: Served) -> None:
    page.open(runs.at("run=collapsing&step=30&colour=max_logit&curve=sigma_q&head=1.0.2&layers=1"))
    page.says(".reading h5", "blocks.1.attn, head 2 at step 30")
    assert page.one(".map-column select").get_property("value") == "max_logit"
    page.until(
        lambda: [t["name"] for t in page.drawn(".course") if t["name"]][-1] == "blocks.1.attn", "one layer"
    )
    page.open(runs.at("run=gone&step=x&head=9.9.9&layers=77&colour=nonsense&curve=%00"))
    page.says(".headline", "gone is not here any more")
    page.says(".reading h5", "blocks.1.attn, head 2 at step 90")


def test_what_cannot_be_shown_says_why(page: Page, runs: Served, tmp_path: Path) -> None:
    page.open(runs.at("run=newer"))
    page.says(".empty", "99")
    page.open(runs.at("run=begun"))
    page.says(".empty", "Nothing has been measured yet")
    assert not page.one(".run").find_elements("css selector", ".js-plotly-plot .main-svg")
    page.open(served(tmp_path).address)
    page.says(".empty", "No run here yet")


HOSTILE = '<img src=x onerror="window.hacked=1">'
LAYER = "<script>window.hacked=1</script>.\"'><b>%{x}</b>&lt;i&gt;../../etc.attn"


def test_whatever_a_run_holds_is_shown_as_text(page: Page, tmp_path: Path) -> None:
    texts = {
        "title": f"T{HOSTILE}",
        "message": f"M{HOSTILE}`{HOSTILE}`",
        "advice": f"A{HOSTILE}",
        "kind": f"K{HOSTILE}",
    }
    evidence = {"worst_head": 1, f"E{HOSTILE}": HOSTILE, "map": [[1.0, 0.0], [0.5, 0.5]]}
    event = alert(10, LAYER, **texts, evidence=evidence, severity="severe")
    write_run(
        tmp_path / HOSTILE.replace("/", ""), range(0, 40, 10), [event], layers=[LAYER, f"second{HOSTILE}"]
    )
    write_run(tmp_path / "javascript:alert(1)", range(0, 40, 10))
    page.open(served(tmp_path).address)
    page.says(".evidence h4", texts["title"])
    page.says(".evidence", f"M{HOSTILE}")
    page.says(".evidence code", HOSTILE)
    page.says(".evidence .todo", texts["advice"])
    page.says(".alert", texts["advice"])
    page.says(".run-name", HOSTILE)
    page.says("h2#run-title", HOSTILE)
    page.says(".reading h5", LAYER)
    page.says("figcaption", LAYER)
    page.drawn(".head-panel")
    page.drawn(".course")
    chart = "return [...document.querySelectorAll(arguments[0])].map((text) => text.textContent)"
    page.until(lambda: page.run(chart, ".heads-map .ytick text"), "the map's labels")
    assert all(
        "<" not in label or LAYER.endswith(label[1:]) or HOSTILE.endswith(label[1:])
        for label in page.run(chart, ".heads-map .ytick text")
    )
    assert f"…{LAYER[-23:]}" in page.run(chart, ".course text[class^=legend]")
    assert page.run("return window.hacked") is None
    assert (
        page.run("return document.querySelectorAll('img, script:not([src]), b, i:not(.ticks i)').length") == 0
    )
    page.run("document.querySelector('.course .js-plotly-plot').scrollIntoView({block: 'center'})")
    page.run(
        "const chart = document.querySelector('.course .js-plotly-plot');"
        "Plotly.Fx.hover(chart, [{curveNumber: 3, pointNumber: 0}])"
    )
    page.until(lambda: page.run(chart, ".course .hoverlayer text"), "what the pointer says")
    assert any(f"T{HOSTILE}" in text for text in page.run(chart, ".course .hoverlayer text"))
    page.run(
        "Plotly.Fx.hover(document.querySelector('.heads-map .js-plotly-plot'), {xval: 1, yval: 0}, 'xy')"
    )
    page.until(
        lambda: any(LAYER in text for text in page.run(chart, ".heads-map .hoverlayer text")),
        "the layer's name",
    )
    assert page.run("return window.hacked") is None


def test_lists_are_filtered_runs_compared_layers_chosen(page: Page, runs: Served) -> None:
    page.open(runs.at("run=collapsing"))
    page.says(".alert", "blocks.0.attn")
    page.click(".alert-list select option", "warning (1)")
    page.until(lambda: [a.text.split()[0] for a in page.all(".alert")] == ["warning"], "one severity")
    page.click(".alert-list select option", "all (2)")
    page.until(lambda: len(page.all(".alert")) == 2, "all severities")
    page.drawn(".compare")
    page.click("input[aria-label='compare sound']")
    page.until(lambda: {trace["name"] for trace in page.drawn(".compare")} == {"collapsing"}, "one run")
    page.click(".layer-chooser summary")
    page.click(".layer-boxes label", "blocks.0.attn")
    page.until(
        lambda: (
            {"blocks.1.attn"}
            == {t["name"] for t in page.drawn(".course")} & {"blocks.0.attn", "blocks.1.attn"}
        ),
        "one layer",
    )
    page.click(".course select option", "largest attention gradient")
    page.until(lambda: page.drawn(".course")[-1]["y"][0] == 0.5, "another figure")


def test_a_theme_can_be_chosen(page: Page, runs: Served) -> None:
    page.open(runs.address)
    page.drawn(".heads-map")
    seen = {}
    for _ in range(3):
        seen[page.one("button", "theme").text] = page.run(
            "return getComputedStyle(document.body).backgroundColor"
        )
        page.click("button", "theme")
    assert seen.keys() == {"theme: auto", "theme: light", "theme: dark"}
    assert seen["theme: light"] != seen["theme: dark"]

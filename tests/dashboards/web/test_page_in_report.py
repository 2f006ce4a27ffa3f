"""The page within a report, opened from its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from entropy_monitor.dashboards import write_report
from entropy_monitor.dashboards.run_view import RunView
from tests.dashboards.web.browser import Page
from tests.dashboards.web.conftest import Served

pytestmark = pytest.mark.xdist_group("chromium")


@pytest.fixture(scope="module")
def report(runs: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    chosen = [runs.folder / name for name in ("sound", "collapsing", "begun")]
    return write_report(chosen, tmp_path_factory.mktemp("report") / "a report.html")


def test_a_report_shows_what_the_server_does(page: Page, report: Path) -> None:
    page.open(report.as_uri())
    page.says(".run-name", "collapsing")
    page.says(".evidence", "Entropy collapse in blocks.1.attn")
    assert "In trouble: collapsing" in page.one("h1").text
    assert page.drawn(".attention-map")[0]["z"][1] == pytest.approx([0.25, 0.75, 0], abs=1e-4)
    page.click(".alert", "blocks.0.attn")
    page.says(".step-words", "step 40")
    page.says(".reading h5", "blocks.0.attn, head 1 at step 40")
    asked = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(("blob:", "data:", "file:")) for name in asked)


def test_its_figures_are_those_of_the_run(page: Page, report: Path, runs: Served) -> None:
    view = RunView(runs.folder / "collapsing")
    page.open(f"{report.as_uri()}#run=collapsing&step=50&colour=max_logit&head=0.0.1&curve=grad_linf")
    page.says(".reading h5", "blocks.0.attn, head 1 at step 50")
    shown = view.grid("max_logit", 5)
    page.until(lambda: page.drawn(".heads-map")[0]["z"] is not None, "the map")
    np.testing.assert_allclose(
        np.array(page.drawn(".heads-map")[0]["z"], float).ravel(), shown["values"], rtol=1e-3
    )
    entropy = view.head(1)["series"]["entropy"]
    drawn = next(trace for trace in page.drawn(".head-panel") if trace["name"] == "entropy")
    assert drawn["x"] == list(entropy["steps"])
    np.testing.assert_allclose(drawn["y"], entropy["values"], rtol=1e-3)
    curve = view.curves("grad_linf")["layers"][0]
    drawn = next(trace for trace in page.drawn(".course") if trace["name"] == "blocks.0.attn")
    assert drawn["x"] == list(curve["steps"])
    np.testing.assert_allclose(drawn["y"], curve["mean"], rtol=1e-3)


def test_it_follows_the_keyboard_and_knows_empty_runs(page: Page, report: Path) -> None:
    page.open(f"{report.as_uri()}#run=sound")
    page.says(".step-words", "step 90 (newest)")
    page.focus(".slider input")
    page.press(Keys.ARROW_LEFT)
    page.says(".step-words", "step 80")
    page.focus(".run-name", "begun")
    page.press(Keys.ENTER)
    page.says("h2#run-title", "begun")
    page.says(".empty", "Nothing")

"""The page in a real browser, as a tab of a TensorBoard that runs on its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from tests.dashboards.web.browser import Page
from tests.dashboards.web.written_runs import alert, begin, step

pytestmark = pytest.mark.xdist_group("chromium")


@pytest.fixture
def tensorboard(tmp_path: Path) -> Iterator[str]:
    """The address of a TensorBoard about `tmp_path`."""
    command = ["-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "0", "--load_fast", "false"]
    log = tmp_path.parent / f"{tmp_path.name}.log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, *command], stdout=out, stderr=out, cwd=tmp_path)
    try:
        address = None
        while address is None:
            assert process.poll() is None, log.read_text()
            address = re.search(r"at (http://\S+/)", log.read_text())
        yield address[1]
    finally:
        process.terminate()
        process.wait(60)


def test_the_tab_shows_runs_while_they_grow(session_page: Page, tmp_path: Path, tensorboard: str) -> None:
    page = session_page
    writer = begin(tmp_path / "live")
    for number in (0, 10, 20):
        writer.log(step(number))
    writer.alert(alert(20))
    page.open(f"{tensorboard}#entropy_monitor")
    page.driver.switch_to.frame(page.one("iframe"))
    page.says(".evidence", "Entropy collapse in blocks.1.attn")
    page.says(".step-words", "step 20 (newest)")
    page.says("figcaption", "Attention map")
    assert page.drawn(".heads-map")[0]["type"] == "heatmap"
    page.click(".slider input")
    page.press(Keys.HOME)
    page.says(".step-words", "step 0")
    page.click(".alert", "blocks.1.attn")
    page.says(".step-words", "step 20")
    page.says(".reading h5", "blocks.1.attn, head 2 at step 20")
    page.click(".slider input")
    page.press(Keys.END)
    writer.log(step(30))
    writer.alert(alert(30, "blocks.0.attn"))
    page.says(".step-words", "step 30 (newest)")
    page.says(".alert", "Entropy collapse in blocks.0.attn")
    writer.close()
    ours = [message for message in page.complaints() if "entropy_monitor" in message.split("#")[0]]
    assert ours == []
    page.driver.switch_to.default_content()

"""A real Chromium, without a window, and a hand on the page in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,900",
)  # fmt: skip
PATIENCE = 60  # seconds; a loaded machine needs some, a test that passes waits for what it asks alone


def start_chromium(profile: Path) -> webdriver.Chrome:
    """A browser with a profile of its own; skips the test where there is none, unless that is forbidden."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        reason = "needs chromium and chromedriver, Debian's packages: the page is not tried in a browser"
        if "chromium" in os.environ.get("ENTROPY_MONITOR_REQUIRE", "").split(","):
            pytest.fail(f"{reason}, which ENTROPY_MONITOR_REQUIRE forbids")
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


class Page:
    """What a person does with the page, and sees there."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> Page:
        """Load the page anew, also where only the fragment differs."""
        self.driver.get("about:blank")
        self.driver.get(address)
        return self

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until something is so."""
        waiting = WebDriverWait(self.driver, PATIENCE, 0.05, (StaleElementReferenceException, IndexError))
        return waiting.until(lambda _: condition(), f"waited for {what}; the page says: {self.body[:2000]}")

    @property
    def body(self) -> str:
        return str(self.run("return document.body.innerText"))

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns that is run in the page."""
        return self.driver.execute_script(script, *arguments)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str, text: str = "") -> WebElement:
        """The first visible element of a kind that holds a text."""

        def found() -> WebElement | None:
            return next((e for e in self.all(css) if e.is_displayed() and text in e.text), None)

        element: WebElement = self.until(found, f"{css} with {text!r}")
        return element

    def click(self, css: str, text: str = "") -> None:
        element = self.one(css, text)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def press(self, *keys: str) -> None:
        """Keys, for whatever has the focus."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def focus(self, css: str, text: str = "") -> None:
        """Go to an element by the Tab key alone."""
        self.run("document.activeElement.blur(); scrollTo(0, 0)")
        self.one(css, text)
        there = (
            "const { activeElement: e } = document;"
            "return e.matches(arguments[0]) && e.innerText.includes(arguments[1])"
        )
        for _ in range(150):
            self.press(Keys.TAB)
            if self.run(there, css, text):
                return
        pytest.fail(f"{css} with {text!r} is not reached by Tab")

    def says(self, css: str, text: str) -> None:
        """Wait until an element says something."""
        self.until(lambda: any(text in element.text for element in self.all(css)), f"{css} to say {text!r}")

    def drawn(self, css: str) -> list[dict[str, Any]]:
        """The traces of a chart, once it has some: names, x, y and z."""
        script = """
            const chart = document.querySelector(arguments[0] + ' .js-plotly-plot');
            const plain = (v) => (v !== null && typeof v === 'object' ? Array.from(v, plain) : v);
            if (!chart || !chart.querySelector('.main-svg')) return null;
            return chart.data.map(({name, type, ...data}) =>
                ({name, type, x: plain(data.x), y: plain(data.y), z: plain(data.z)}));
        """
        traces: list[dict[str, Any]] = self.until(lambda: self.run(script, css), f"a chart in {css}")
        return traces

    def complaints(self) -> list[str]:
        """What the browser's console holds against the page since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

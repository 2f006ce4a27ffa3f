"""The browser, and a server of runs to look at."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from entropy_monitor.dashboards.web import serve
from entropy_monitor.store import documents
from tests.dashboards.web.browser import PATIENCE, Page, start_chromium
from tests.dashboards.web.written_runs import alert, begin, write_run

COLLAPSING = [
    alert(20, "blocks.1.attn", heads=(2,), message="Head 2 fell to 4 %. See `em.sigma_reparam(model)`."),
    alert(
        40, "blocks.0.attn", heads=(0, 1), severity="warning", evidence={"worst_head": 1, "max_logit": 120.0}
    ),
]


@dataclass(frozen=True)
class Served:
    """A folder, and the address it is served at."""

    folder: Path
    address: str

    def at(self, fragment: str) -> str:
        return f"{self.address}#{fragment}"


def served(folder: Path) -> Served:
    """Serve a folder for as long as the tests run."""
    said: list[str] = []
    is_ready = threading.Event()

    def on_ready(address: str) -> None:
        said.append(address)
        is_ready.set()

    threading.Thread(
        target=serve, args=(folder,), kwargs={"port": 0, "on_ready": on_ready}, daemon=True
    ).start()
    assert is_ready.wait(PATIENCE)
    return Served(folder, said[0])


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Runs of every kind: collapsing, sound, just begun, and of a newer version."""
    folder = tmp_path_factory.mktemp("served")
    write_run(folder / "collapsing", range(0, 100, 10), COLLAPSING)
    write_run(folder / "sound", range(0, 100, 10))
    begin(folder / "begun")
    documents.replace(write_run(folder / "newer") / "run.json", {"format": 99})
    return served(folder)


@pytest.fixture(scope="session")
def session_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    driver = start_chromium(tmp_path_factory.mktemp("profile"))
    yield Page(driver)
    driver.quit()


@pytest.fixture
def page(session_page: Page) -> Iterator[Page]:
    """The browser; at the test's end nothing may have complained."""
    session_page.complaints()
    yield session_page
    assert session_page.complaints() == []

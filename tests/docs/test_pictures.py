"""The pictures on the pages are drawn by commands."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.docs import scene
from tests.docs.pages import ROOT
from tests.test_examples import run


def test_the_picture_of_the_page(tmp_path: Path) -> None:
    if shutil.which("chromium") is None:
        reason = "needs chromium, Debian's package: the picture of the page is not drawn"
        if "chromium" in os.environ.get("ENTROPY_MONITOR_REQUIRE", "").split(","):
            pytest.fail(f"{reason}, which ENTROPY_MONITOR_REQUIRE forbids")
        pytest.skip(reason)
    scene.record_runs(tmp_path / "runs")
    out = tmp_path / "page.png"
    run(str(ROOT / "benchmarks" / "page_picture.py"), str(tmp_path / "runs"), "-o", str(out))
    with Image.open(out) as picture:
        assert picture.size == (1280, 1430)
        assert len(picture.convert("RGB").getcolors(2**24)) > 50

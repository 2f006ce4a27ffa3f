"""Draws the picture of the page in docs/viewing.md from the demonstration's runs.

`entropy-monitor demo -o runs/demo`, then `python benchmarks/page_picture.py runs/demo`. Needs Chromium.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import threading
from pathlib import Path

from PIL import Image

from entropy_monitor.dashboards.web.server import serve

WIDTH, HEIGHT = 1280, 1430
COLOURS = 256


def photograph(address: str, out: Path, browser: str, height: int) -> None:
    """What a browser shows at an address once it is drawn, in few colours."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += ["--virtual-time-budget=12000", f"--window-size={WIDTH},{height}", f"--screenshot={shot}"]
        subprocess.run([browser, *options, address], check=True, capture_output=True, timeout=120)
        with Image.open(shot) as picture:
            picture.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(out, optimize=True)


def main() -> None:
    """Serve the runs, and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder that the demonstration wrote")
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/page.png"))
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--height", type=int, default=HEIGHT)
    options = parser.parse_args()
    address: list[str] = []
    ready = threading.Event()

    def on_ready(found: str) -> None:
        address.append(found)
        ready.set()

    work = {"port": 0, "on_ready": on_ready}
    threading.Thread(target=serve, args=(options.runs,), kwargs=work, daemon=True).start()
    if not ready.wait(60):
        raise SystemExit("the page did not start")
    photograph(address[0], options.out, options.browser, options.height)
    print(options.out)


if __name__ == "__main__":
    main()

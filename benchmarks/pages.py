"""How soon a page shows a run of ten million head rows, and what looking at it costs.

`python benchmarks/pages.py`. For runs of 12,800 heads × 800 measured steps, of 384 × 26,000 and of
384 × 80,000 (of which blocks are shown), all made up, it prints:

- MB on disk, and how much of it is blocks (`levels-*.arrows`);
- seconds until a server that has just started has answered what the first view asks (the list of runs, one
  run, its curves, the map, one head), and until headless Chromium has drawn it, where it is installed;
- seconds for a run that is being written to be read on, when one record more is there, and when none is;
- seconds and MB of the report.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from shutil import which
from typing import Any
from urllib.parse import urlencode

from models import machine
from scale_store import EVERY, Depth, records, write_run

from entropy_monitor.dashboards import write_report
from entropy_monitor.dashboards.packing import unpack
from entropy_monitor.dashboards.run_view import RunView
from entropy_monitor.records import RunInfo
from entropy_monitor.store import RunWriter

RUNS = {
    "12,800 heads × 800": (Depth(400, 32), 800),
    "384 heads × 26,000": (Depth(12, 32), 26_000),
    "384 heads × 80,000": (Depth(12, 32), 80_000),
}
SMOKE = {"4 heads × 20": (Depth(2, 2), 20)}
_CHARTS = "return document.querySelectorAll('.js-plotly-plot').length"
_SERVER = (
    "import sys\n"
    "from entropy_monitor.dashboards.web import serve\n"
    "serve(sys.argv[1], port=0, on_ready=lambda address: print(address, flush=True))\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    options = parser.parse_args()
    print(machine("cpu"))
    titles = ("MB", "blocks", "answers", "drawn", "read on", "idle", "report", "MB")
    print("run".ljust(22) + "".join(title.rjust(9) for title in titles))
    with tempfile.TemporaryDirectory() as scratch:
        for name, (depth, measured) in (SMOKE if options.smoke else RUNS).items():
            folder = Path(scratch) / str(depth.rows * measured)
            print(f"{name:22}{_line(folder, depth, measured)}", flush=True)


def _line(folder: Path, depth: Depth, measured: int) -> str:
    run = folder / "run"
    size = write_run(run, measured * EVERY, time.perf_counter, depth).bytes_
    blocks = sum(path.stat().st_size for path in run.glob("levels-*"))
    with _server(folder) as address:
        answers = _answers(address)
    drawn = _drawn(folder)
    read_on, idle = _read_on(folder / "live", depth, measured)
    began = time.perf_counter()
    report = write_report(run, folder / "report.html")
    seconds = time.perf_counter() - began
    return (
        f"{size / 1e6:9.0f}{blocks / 1e6:9.0f}{answers:9.2f}{drawn:>9}{read_on:9.3f}{idle:9.4f}"
        f"{seconds:9.1f}{report.stat().st_size / 1e6:9.1f}"
    )


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-c", _SERVER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def _answers(address: str) -> float:
    """Seconds for what the first view of a run asks, in turn."""
    began = time.perf_counter()
    while any(run.get("pending") for run in _ask(address, "runs", {})["runs"]):
        time.sleep(0.02)
    for question, parameters in (
        ("overview", {"run": "run"}),
        ("curves", {"run": "run", "column": "entropy"}),
        ("grid", {"run": "run", "column": "entropy_share", "position": 0}),
        ("head", {"run": "run", "row": 0}),
    ):
        _ask(address, question, parameters)
    return time.perf_counter() - began


def _ask(address: str, question: str, parameters: dict[str, Any]) -> Any:
    with urllib.request.urlopen(f"{address}api/{question}?{urlencode(parameters)}") as answer:
        return unpack(answer.read())


@contextmanager
def _browser() -> Iterator[Any]:
    """Headless Chromium, or None where it is not installed."""
    if not (which("chromium") and which("chromedriver") and util.find_spec("selenium")):
        yield None
        return
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"):
        options.add_argument(argument)
    window = webdriver.Chrome(options, webdriver.ChromeService(which("chromedriver")))
    try:
        yield window
    finally:
        window.quit()


def _drawn(folder: Path) -> str:
    """Seconds until the map, one head and the layers are drawn by a browser that is there already."""
    with _browser() as window:
        if window is None:
            return "–"
        window.get("about:blank")
        with _server(folder) as address:
            began = time.perf_counter()
            window.get(address)
            while window.execute_script(_CHARTS) < 3:
                time.sleep(0.02)
            return f"{time.perf_counter() - began:.2f}"


def _read_on(folder: Path, depth: Depth, measured: int) -> tuple[float, float]:
    """Seconds to read one record more of a run that goes on, with its map, and to find that there is none."""
    writer = RunWriter(folder, flush_seconds=0 if measured < 1000 else 1)
    writer.open(RunInfo(model={"class": "Simulated", "parameters": {}}, options={}, versions={}))
    made = records((measured + 1) * EVERY, depth)
    for _ in range(measured):
        writer.log(next(made))
    writer.flush()
    view = RunView(folder)
    view.card()
    view.grid("entropy_share", 0)
    writer.log(next(made))
    writer.flush()
    began = time.perf_counter()
    view.refresh()
    view.card()
    view.grid("entropy_share", 0)
    read_on = time.perf_counter() - began
    began = time.perf_counter()
    view.refresh()
    idle = time.perf_counter() - began
    writer.close()
    return read_on, idle


if __name__ == "__main__":
    main()

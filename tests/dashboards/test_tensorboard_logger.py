"""What the logger wrote, as TensorBoard's own server tells it over HTTP."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.program import TensorBoard

from entropy_monitor.dashboards import TensorBoardLogger
from entropy_monitor.dashboards.grids import head_grid
from entropy_monitor.dashboards.heatmap import heatmap
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import HEADS, SCALARS, AlertEvent, Record, RunInfo
from entropy_monitor.store import RunWriter
from entropy_monitor.trackers.aggregates import aggregate_layers, entropy_share
from entropy_monitor.trackers.whole_model import WholeModel
from tests.dashboards.html_cells import TABLE_TAGS, Cells
from tests.dashboards.records_factory import bare, columns, event, head_row, info, record, seldom

Get = Callable[..., Any]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Get]:
    """Starts TensorBoard on a free loopback port, the log directory read before it answers."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def start(logdir: Path) -> Get:
        board = TensorBoard()
        board.configure(
            logdir=str(logdir),
            host="127.0.0.1",
            port=0,
            load_fast="false",
            reload_task="blocking",
            reload_interval=0,
        )
        url = board.launch()

        def get(route: str, raw: bool = False, **query: str) -> Any:
            target = f"{url}data/plugin/{route}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(target, timeout=30) as answer:
                body = answer.read()
            return body if raw else json.loads(body)

        return get

    return start


def write(logger: TensorBoardLogger, about: RunInfo, *items: Record | AlertEvent) -> None:
    logger.open(about)
    for item in items:
        if isinstance(item, Record):
            logger.log(item)
        else:
            logger.alert(item)
    logger.close()


def series(get: Get, tag: str) -> dict[int, float]:
    points = get("scalars/scalars", run=".", tag=tag)
    assert len({step for _, step, _ in points}) == len(points), f"a step of {tag} was written twice"
    return {step: float(value) for _, step, value in points}


def text(get: Get, tag: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = get("text/text", run=".", tag=f"{tag}/text_summary")
    return found


def test_serves_every_aggregate_of_every_record(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    records = [record(step) for step in (0, 10, 20)]
    write(TensorBoardLogger(tmp_path), info(), *records)
    get = serve(tmp_path)
    expected: dict[str, dict[int, float]] = {}
    for rec in records:
        for tag, value in WholeModel().metrics(aggregate_layers(rec)).items():
            expected.setdefault(tag, {})[rec.step] = value
        expected.setdefault("train/loss", {})[rec.step] = 4.0 - rec.step / 100
    served = set(get("scalars/tags")["."])
    assert served == {*expected, "attention/open_alerts"}
    for tag, points in expected.items():
        assert series(get, tag) == pytest.approx(points, rel=1e-6)


def test_nulls_are_absent_and_nan_readings_stay(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    write(TensorBoardLogger(tmp_path), info(), record(0), record(10, entropy=math.nan, max_logit=math.inf))
    get = serve(tmp_path)
    tags = set(get("scalars/tags")["."])
    assert not {tag for tag in tags if tag.endswith(("floor_weights", "sigma_v", "update_sigma"))}
    assert math.isnan(series(get, "attention/layer_00/entropy_min")[10])
    assert series(get, "attention/layer_01/max_logit")[10] == math.inf


def test_the_largest_norm_is_written_where_it_is_that_of_the_whole_model(
    tmp_path: Path, serve: Callable[[Path], Get]
) -> None:
    write(TensorBoardLogger(tmp_path), info(), *seldom())
    get = serve(tmp_path)
    assert series(get, "attention/all/sigma_qk_max") == {0: 9.0, 4: 9.0}
    assert series(get, "attention/layer_00/sigma_qk_max") == dict.fromkeys(range(6), 3.0)


def test_scalars_stand_at_their_own_steps(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    rows = [{"step": s, "name": n, "value": s + v} for s in (8, 9, 10) for n, v in (("loss", 1), ("lr", 2))]
    write(TensorBoardLogger(tmp_path), info(), Record(10, HEADS.empty(), scalars=columns(SCALARS, rows)))
    get = serve(tmp_path)
    assert series(get, "train/loss") == {8: 9.0, 9: 10.0, 10: 11.0}
    assert series(get, "train/lr") == {8: 10.0, 9: 11.0, 10: 12.0}


def test_charts_name_tags_that_exist(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    write(TensorBoardLogger(tmp_path), info(), record(0), record(10))
    get = serve(tmp_path)
    categories = {c["title"]: c["chart"] for c in get("custom_scalars/layout")["category"]}
    (title,) = (t for t in categories if t.startswith("Entropy: mean, least"))
    (_, chart) = categories[title]  # shown from its end
    assert chart["title"] == "layer_00"
    assert chart["margin"]["series"] == [
        {
            "value": "attention/layer_00/entropy_mean",
            "lower": "attention/layer_00/entropy_min",
            "upper": "attention/layer_00/entropy_max",
        }
    ]
    (floors,) = (c for t, c in categories.items() if t.startswith("Entropy and its floors"))
    shown: set[str] = set()
    for regex in floors[0]["multiline"]["tag"]:
        shown |= get("custom_scalars/scalars", run=".", tag=regex)["tag_to_events"].keys()
    assert shown == {f"attention/layer_00/{m}" for m in ("entropy_min", "floor_row", "max_entropy")}


def test_layers_that_come_late_join_the_legend_and_the_charts(
    tmp_path: Path, serve: Callable[[Path], Get]
) -> None:
    write(TensorBoardLogger(tmp_path), info(), record(0, layers=1), record(10, layers=2))
    get = serve(tmp_path)
    assert "blocks.1.attn" in text(get, "attention/layers")[-1]["text"]
    titles = [c["title"] for c in get("custom_scalars/layout")["category"]]
    assert "Entropy and its floors, layer_00 to layer_01" in titles


def test_heatmap_is_the_picture_of_the_shares(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    records = [record(step) for step in range(6)]
    write(TensorBoardLogger(tmp_path, heatmap_every=4), info(), *records)
    get = serve(tmp_path)
    images = get("images/images", run=".", tag="attention/entropy_share", sample="0")
    assert [entry["step"] for entry in images] == [0, 4]
    query = dict(urllib.parse.parse_qsl(images[1]["query"]))
    with Image.open(io.BytesIO(get("images/individualImage", raw=True, **query))) as served:
        shares = head_grid(records[4].heads, entropy_share(records[4].heads))
        np.testing.assert_array_equal(np.asarray(served), heatmap(shares.values))


def test_no_pictures_where_none_are_wanted(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    write(TensorBoardLogger(tmp_path, heatmap_every=0, histogram_every=0), info(), record(0))
    get = serve(tmp_path)
    assert get("images/tags") == {}
    assert get("histograms/tags") == {}


def test_histograms_count_every_head(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    records = [record(0), record(10, entropy=0.01), record(20, sigma_qk=math.nan)]
    write(TensorBoardLogger(tmp_path, histogram_every=1), info(), *records)
    get = serve(tmp_path)
    tags = get("histograms/tags")["."]
    assert set(tags) == {f"attention/heads/{name}" for name in ("entropy_share", "max_logit", "sigma_qk")}
    for tag, expected in (("entropy_share", [0, 10, 20]), ("sigma_qk", [0, 10])):
        events = get("histograms/histograms", run=".", tag=f"attention/heads/{tag}")
        assert [step for _, step, _ in events] == expected
        for _, _, buckets in events:
            assert sum(count for *_, count in buckets) == pytest.approx(8)
            assert all(low < high for low, high, _ in buckets)
    _, (_, _, buckets), _ = get("histograms/histograms", run=".", tag="attention/heads/entropy_share")
    assert [(low, high) for low, high, count in buckets if count > 0] == [(0.0, pytest.approx(0.02))]


def test_a_text_says_what_every_figure_is(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    write(TensorBoardLogger(tmp_path), info(), record(0), record(10, layers=3))
    get = serve(tmp_path)
    (legend,) = text(get, "attention/figures")
    rows = dict(Cells(legend["text"]).rows)
    scalars, pictures = get("scalars/tags")["."], get("images/tags")["."]
    metrics = {tag.split("/")[2] for tag in scalars if "/layer_" in tag}
    assert {f"layer_…/{metric}" for metric in metrics} <= rows.keys()
    assert {f"{tag.split('/')[1]}, heads/{tag.split('/')[1]}" for tag in pictures} <= rows.keys()
    assert "nats" in rows["layer_…/entropy_min"]


def test_deep_models_do_not_drown_it(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    write(
        TensorBoardLogger(tmp_path, max_layers=4),
        info(),
        record(0, layers=200),
        event(step=0, opened=0, layer="blocks.77.attn"),
        record(10, layers=200),
    )
    get = serve(tmp_path)
    tags = set(get("scalars/tags")["."])
    of_layers = {tag.split("/")[1] for tag in tags if "/layer_" in tag}
    assert of_layers == {f"layer_{n:02d}" for n in (0, 66, 77, 133, 199)}
    assert series(get, "attention/layer_77/entropy_min").keys() == {10}
    assert series(get, "attention/all/entropy_min").keys() == {0, 10}
    legend = Cells(text(get, "attention/layers")[-1]["text"]).rows
    assert [row for row in legend if row[2] == "yes"][2] == ["77", "blocks.77.attn", "yes"]
    assert len(legend) == 200
    categories = {c["title"]: c["chart"] for c in get("custom_scalars/layout")["category"]}
    (alerted,) = (c for t, c in categories.items() if t.startswith("Layers with an alert"))
    assert [chart["title"] for chart in alerted] == ["layer_77"]
    assert len(categories) == 5


def test_many_alerts_at_once_are_one_table(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    alerts = [event(alert_id=str(n), layer=f"blocks.{n}.attn", step=10) for n in range(400)]
    write(TensorBoardLogger(tmp_path), info(), record(10), *alerts, record(20))
    get = serve(tmp_path)
    assert [entry["step"] for entry in text(get, "attention/alerts")] == [10]
    assert series(get, "attention/open_alerts") == {10: 400, 20: 400}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 500_000


def test_an_alert_is_written_when_nothing_comes_for_a_while(
    tmp_path: Path, serve: Callable[[Path], Get]
) -> None:
    logger = TensorBoardLogger(tmp_path, flush_secs=1000)
    logger.open(info())
    logger.log(record(10))
    logger.alert(event(step=10))
    logger.flush()
    get = serve(tmp_path)
    assert [entry["step"] for entry in text(get, "attention/alerts")] == [10]
    logger.flush()
    logger.close()
    assert len(text(serve(tmp_path), "attention/alerts")) == 1


def test_alerts_are_one_growing_table(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    second = {"alert_id": "a2", "opened": 20, "layer": "blocks.1.attn"}
    write(
        TensorBoardLogger(tmp_path),
        info(),
        record(10),
        event(step=10),
        record(20),
        event(step=20, **second),
        record(30),
        event("closed", 30),
        record(40),
    )
    get = serve(tmp_path)
    tables = text(get, "attention/alerts")
    assert [t["step"] for t in tables] == [10, 20, 30]
    assert [t["text"].count("open since step") for t in tables] == [1, 2, 1]
    assert "closed at step 30" in tables[-1]["text"]
    assert all("Lower the learning rate." in t["text"] for t in tables)
    assert series(get, "attention/open_alerts") == {10: 1, 20: 2, 30: 1, 40: 1}


def test_names_are_shown_as_text(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    name = "a|b<script>alert(1)</script>[x](javascript:y)_z_"
    write(
        TensorBoardLogger(tmp_path),
        info(),
        bare(0, [head_row(0, 0, 0, layer=name)]),
        event(layer=name, step=0, opened=0, title=name),
    )
    get = serve(tmp_path)
    for tag in ("attention/layers", "attention/alerts"):
        cells = Cells(text(get, tag)[-1]["text"])
        assert name in " ".join(cells.rows[-1])
        assert cells.tags == TABLE_TAGS


def test_calls_of_a_layer_have_tags_of_their_own(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    rows = [head_row(0, 0, 0), head_row(0, 0, 0, call=1, entropy=0.5)]
    write(TensorBoardLogger(tmp_path), info(), bare(0, rows))
    get = serve(tmp_path)
    assert series(get, "attention/layer_00/entropy_min") == {0: 2.0}
    assert series(get, "attention/layer_00/call_1/entropy_min") == {0: 0.5}


def test_a_continued_run_voids_what_it_does_again(tmp_path: Path, serve: Callable[[Path], Get]) -> None:
    run_dir, tb = tmp_path / "run", tmp_path / "run" / "tb"
    kept, voided = event(step=10), event(step=30, alert_id="a2", opened=30)
    store = RunWriter(run_dir)
    store.open(info(str(run_dir)))
    for item in (record(10), record(20), record(30)):
        store.log(item)
    for happened in (kept, voided):
        store.alert(happened)
    store.close()
    write(TensorBoardLogger(), info(str(run_dir)), record(10), kept, record(20), record(30), voided)
    (first,) = tb.iterdir()  # a restart takes a while; files are read in the order of their names
    seconds = first.name.split(".")[3]
    first.rename(tb / first.name.replace(seconds, str(int(seconds) - 60)))
    again = record(20, entropy=1.0)
    late = event(step=40, alert_id="a3", opened=40)
    write(TensorBoardLogger(), info(str(run_dir), session=1), again, record(40), late)
    get = serve(tb)
    assert series(get, "attention/layer_00/entropy_mean") == pytest.approx({10: 1.8225, 20: 1.0, 40: 1.8525})
    opened = {
        t["step"]: [row[0].rsplit(" ", 1)[-1] for row in Cells(t["text"]).rows]
        for t in text(get, "attention/alerts")
    }
    assert opened == {10: ["10"], 20: ["10"], 40: ["40", "10"]}


def test_writes_into_the_run_directory_by_default(tmp_path: Path) -> None:
    write(TensorBoardLogger(), info(str(tmp_path)), record(0))
    assert list((tmp_path / "tb").glob("events.out.tfevents.*"))


def test_only_rank_0_writes(tmp_path: Path) -> None:
    write(TensorBoardLogger(tmp_path / "tb"), info(rank=1), record(0), event())
    assert not (tmp_path / "tb").exists()


def test_closing_twice_or_without_opening_does_nothing(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.close()
    write(logger, info(), record(0))
    logger.close()
    logger.log(record(10))
    logger.alert(event())
    assert len(list(tmp_path.iterdir())) == 1


def test_a_closed_logger_serves_another_run(tmp_path: Path) -> None:
    logger = TensorBoardLogger()
    for name in ("a", "b"):
        write(logger, info(str(tmp_path / name)), record(0))
        assert (tmp_path / name / "tb").is_dir()


def test_refuses_to_open_twice(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.open(info())
    with pytest.raises(
        ConfigurationError, match=f"already writing to {re.escape(str(tmp_path))}; give each monitor"
    ):
        logger.open(info())
    logger.close()


def test_says_when_there_is_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere to write: it was given no log_dir"):
        TensorBoardLogger().open(info(None))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match="is a file; give a folder"):
        TensorBoardLogger(file).open(info())
    with pytest.raises(ConfigurationError, match=r"cannot write to .*; give another log_dir"):
        TensorBoardLogger(file / "below").open(info())


@pytest.mark.parametrize("option", ["heatmap_every", "histogram_every", "max_layers"])
def test_refuses_a_number_that_is_none(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option} is -1; give a whole number"):
        TensorBoardLogger(tmp_path, **{option: -1})  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_refuses_a_flush_interval_that_is_none(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ConfigurationError, match=r"flush_secs is .*; give a number of seconds above 0"):
        TensorBoardLogger(tmp_path, flush_secs=seconds)


def test_names_the_extra_when_tensorboard_is_missing() -> None:
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from entropy_monitor.dashboards import TensorBoardLogger\n"
        "from entropy_monitor.errors import MissingExtraError\n"
        "try: TensorBoardLogger('x')\n"
        "except MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "TensorBoardLogger needs tensorboard, which is not installed: "
        "pip install 'entropy-monitor[tensorboard]'"
    )


@pytest.mark.parametrize("touch", ["", "; entropy_monitor.dashboards.WandbLogger"])
def test_importing_the_package_loads_no_tracker(touch: str) -> None:
    code = (
        f"import sys, entropy_monitor.dashboards{touch}; "
        "print(sorted({'wandb', 'tensorboard', 'matplotlib', 'jinja2', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

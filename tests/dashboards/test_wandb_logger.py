"""What the logger recorded offline, as W&B's own reader tells it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image

from entropy_monitor.dashboards import WandbLogger
from entropy_monitor.dashboards.grids import head_grid
from entropy_monitor.dashboards.heatmap import heatmap
from entropy_monitor.errors import ConfigurationError
from entropy_monitor.records import HEADS, SCALARS, AlertEvent, Record, RunInfo
from entropy_monitor.trackers.aggregates import aggregate_layers, entropy_share
from entropy_monitor.trackers.whole_model import WholeModel
from tests.dashboards.records_factory import columns, event, info, record, seldom

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No account, no settings, and nothing written outside of the test's folder."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    yield
    if wandb.run is not None:
        wandb.run.finish()
    wandb.teardown()


class Recording:
    """An offline run, read back by `wandb leet inspect`."""

    def __init__(self, folder: Path) -> None:
        (run,) = (folder / "wandb").glob("offline-run-*")
        self.files = run / "files"
        self.records = self._read(run)
        self.rows = [r["history"]["item"] for r in self.records if r["type"] == "history"]
        self.metrics = [r["metric"] for r in self.records if r["type"] == "metric"]
        self.alerts = [r["alert"] for r in self.records if r["type"] == "alert"]
        self.summary: dict[str, Any] = {}
        for entry in (r["summary"] for r in self.records if r["type"] == "summary"):
            self.summary |= entry.get("update", {})

    @staticmethod
    def _read(run: Path) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def media(self, row: dict[str, Any], key: str) -> Path:
        return self.files / str(row[f"{key}.path"])


def write(logger: WandbLogger, about: RunInfo, *items: Record | AlertEvent) -> None:
    """As the monitor does: opened here, the rest on another thread."""
    logger.open(about)

    def work() -> None:
        for item in items:
            if isinstance(item, Record):
                logger.log(item)
            else:
                logger.alert(item)
        logger.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_records_every_aggregate_over_the_training_step(tmp_path: Path) -> None:
    records = [record(step) for step in (0, 10, 20)]
    write(WandbLogger(dir=tmp_path, heads_table_every=0), info(), *records)
    recording = Recording(tmp_path)
    assert len(recording.rows) == 3
    for row, rec in zip(recording.rows, records, strict=True):
        expected = WholeModel().metrics(aggregate_layers(rec))
        assert row["attention/step"] == rec.step
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert row["attention/train/loss"] == pytest.approx(4.0 - rec.step / 100)
        assert row["attention/open_alerts"] == 0
    assert [row["_step"] for row in recording.rows] == [0, 1, 2]
    assert {"glob_name": "attention/*", "step_metric": "attention/step"}.items() <= (
        recording.metrics[1].items()
    )


def test_nulls_are_absent_and_nan_readings_stay(tmp_path: Path) -> None:
    write(WandbLogger(dir=tmp_path, heads_table_every=0), info(), record(0, entropy=math.nan))
    (row,) = Recording(tmp_path).rows
    assert not [name for name in row if name.endswith(("floor_weights", "sigma_v", "update_sigma"))]
    assert math.isnan(float(row["attention/layer_00/entropy_min"]))


def test_the_largest_norm_is_logged_where_it_is_that_of_the_whole_model(tmp_path: Path) -> None:
    write(WandbLogger(dir=tmp_path, heads_table_every=0), info(), *seldom())
    rows = Recording(tmp_path).rows
    found = {
        row["attention/step"]: row.get("attention/all/sigma_qk_max")
        for row in rows
        if "attention/step" in row
    }
    assert found == {0: 9.0, 1: None, 2: None, 3: None, 4: 9.0, 5: None}
    assert [row["attention/layer_00/sigma_qk_max"] for row in rows] == [3.0] * 6


def test_summary_keeps_the_least_entropy_and_the_open_alerts(tmp_path: Path) -> None:
    records = [record(s, entropy=e) for s, e in ((0, 2.0), (10, 0.5), (20, 1.0))]
    write(WandbLogger(dir=tmp_path), info(), *records, event(step=20))
    summary = Recording(tmp_path).summary
    assert summary["attention/layer_00/entropy_min"] == {"min": 0.5, "last": 1.0}
    assert summary["attention/all/max_logit"] == {"max": 5.0, "last": 5.0}
    assert summary["attention/open_alerts"] == 1


def test_heads_are_tables_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    records = [record(step) for step in range(4)]
    write(WandbLogger(dir=tmp_path, heads_table_every=2), info(), *records)
    recording = Recording(tmp_path)
    tabled = [row for row in recording.rows if "attention/heads.path" in row]
    assert [row["attention/step"] for row in tabled] == [0, 2, 3]
    table = json.loads(recording.media(tabled[-1], "attention/heads").read_text())
    assert tuple(table["columns"]) == HEADS.names
    assert [row[0] for row in table["data"]] == [3] * 8
    np.testing.assert_allclose(
        [row[HEADS.names.index("entropy")] for row in table["data"]], records[3].heads["entropy"]
    )
    assert {row[HEADS.names.index("floor_weights")] for row in table["data"]} == {None}


def test_heatmap_is_the_picture_of_the_shares(tmp_path: Path) -> None:
    rec = record(5)
    write(WandbLogger(dir=tmp_path), info(), rec)
    recording = Recording(tmp_path)
    with Image.open(recording.media(recording.rows[0], "attention/entropy_share")) as saved:
        shares = head_grid(rec.heads, entropy_share(rec.heads))
        np.testing.assert_array_equal(np.asarray(saved), heatmap(shares.values))


def test_histograms_count_every_head(tmp_path: Path) -> None:
    write(WandbLogger(dir=tmp_path, histogram_every=2), info(), *(record(step) for step in (0, 10, 20)))
    recording = Recording(tmp_path)
    names = [f"attention/heads/{name}" for name in ("entropy_share", "max_logit", "sigma_qk")]
    for name in names:
        steps = {
            row["attention/step"]: row[f"{name}.values"] for row in recording.rows if f"{name}.bins" in row
        }
        assert steps.keys() == {0, 20}
        assert all(sum(counts) == 8 for counts in steps.values())
    assert recording.rows[0]["attention/heads/entropy_share.bins"] == pytest.approx(np.linspace(0, 1, 51))


def test_deep_models_do_not_drown_it(tmp_path: Path) -> None:
    write(
        WandbLogger(dir=tmp_path, max_layers=4),
        info(),
        record(0, layers=200),
        event(step=0, opened=0, layer="blocks.77.attn"),
        record(10, layers=200),
    )
    recording = Recording(tmp_path)
    of_layers = {name.split("/")[1] for row in recording.rows for name in row if "/layer_" in name}
    assert of_layers == {f"layer_{n:02d}" for n in (0, 66, 77, 133, 199)}
    table = json.loads(recording.media(recording.rows[-1], "attention/layers").read_text())
    assert [row[:2] for row in table["data"]] == [[n, f"blocks.{n}.attn"] for n in range(200)]


def test_metrics_beside_the_main_ones_are_not_drawn_unasked(tmp_path: Path) -> None:
    write(WandbLogger(dir=tmp_path), info(), record(0))
    hidden = {
        metric["name"] for metric in Recording(tmp_path).metrics if metric.get("options", {}).get("hidden")
    }
    shown = {"entropy_mean", "entropy_min", "max_logit", "sigma_qk_max", "grad_linf"}
    named = WholeModel().metrics(aggregate_layers(record(0)))
    assert hidden == {"attention/step"} | {name for name in named if name.rpartition("/")[2] not in shown}


def test_the_summary_says_what_the_run_came_to(tmp_path: Path) -> None:
    write(
        WandbLogger(dir=tmp_path),
        info(),
        record(10, sigma_qk=2.0),
        event(step=10, title="It collapses"),
        record(20, entropy=0.1, max_logit=90.0, sigma_qk=5.0),
        event("updated", 20, severity="severe", title="It collapses"),
    )
    summary = Recording(tmp_path).summary
    found = {name: summary[f"attention/{name}"] for name in (
        "verdict", "alerts_severe", "alerts_warning", "open_alerts", "first_alert", "first_alert_step",
        "last_step", "largest_logit", "largest_logit_at", "sigma_growth",
    )}  # fmt: skip
    assert found == {
        "verdict": "trouble", "alerts_severe": 1, "alerts_warning": 0, "open_alerts": 1,
        "first_alert": "It collapses", "first_alert_step": 10, "last_step": 20, "largest_logit": 90,
        "largest_logit_at": "blocks.0.attn, head 0, step 20", "sigma_growth": 2.5,
    }  # fmt: skip
    assert summary["attention/lowest_share"] == pytest.approx(0.1 / np.log(16))


def test_a_continued_run_keeps_the_extremes_of_its_summary(tmp_path: Path) -> None:
    settings = wandb.Settings(console="off", silent=True)
    run = wandb.init(mode="offline", dir=str(tmp_path), settings=settings)
    run.summary.update({"attention/largest_logit": 500.0, "attention/largest_logit_at": "before"})
    write(WandbLogger(run), info(session=1), record(10))
    run.finish()
    summary = Recording(tmp_path).summary
    assert (summary["attention/largest_logit"], summary["attention/largest_logit_at"]) == (500, "before")


def test_alerts_are_sent_when_they_open_and_when_they_get_worse(tmp_path: Path) -> None:
    write(
        WandbLogger(dir=tmp_path, alert_wait=0),
        info(),
        record(10),
        event(step=10),
        record(20),
        event("updated", 20),
        record(30),
        event("updated", 30, severity="severe"),
        record(40),
        event("closed", 40, severity="severe"),
    )
    recording = Recording(tmp_path)
    assert [(a["level"], a["title"]) for a in recording.alerts] == [
        ("WARN", "[warning] Entropy collapse in blocks.0.attn"),
        ("ERROR", "[severe] Entropy collapse in blocks.0.attn"),
    ]
    assert recording.alerts[0]["text"] == (
        "Heads 0 and 2 fell to 4 % of their maximum.\n\nWhat to do: Lower the learning rate."
    )
    assert int(recording.alerts[0]["wait_duration"]) == 1000
    table = json.loads(recording.media(recording.rows[-1], "attention/alerts").read_text())
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert (row["opened"], row["closed"], row["severity"]) == (10, 40, "severe")
    assert recording.summary["attention/open_alerts"] == 0


def test_alerts_within_the_wait_are_one_message_and_what_waits_is_sent_at_the_end(tmp_path: Path) -> None:
    alerts = [event(step=10, alert_id=str(n), title=f"alert {n}") for n in range(3)]
    late = event(step=20, opened=20, alert_id="late", title="late")
    write(WandbLogger(dir=tmp_path), info(), record(10), *alerts, record(20), late, record(30), record(40))
    recording = Recording(tmp_path)
    assert [a["title"] for a in recording.alerts] == ["[warning] 3 alerts: alert 0", "[warning] late"]
    tabled = [row["attention/step"] for row in recording.rows if "attention/alerts.path" in row]
    assert tabled == [20, 40]


def test_an_alert_is_told_when_nothing_comes_for_a_while(tmp_path: Path) -> None:
    settings = wandb.Settings(console="off", silent=True)
    run = wandb.init(mode="offline", dir=str(tmp_path), settings=settings)
    logger = WandbLogger(run)
    logger.open(info())
    logger.log(record(10))
    logger.alert(event())
    logger.flush()
    run.finish()  # before the logger could tell anything more
    logger.close()
    recording = Recording(tmp_path)
    assert len(recording.alerts) == 1
    assert recording.summary["attention/verdict"] == "watch"


def test_of_scalars_the_last_since_the_record_before_counts(tmp_path: Path) -> None:
    rows = [{"step": s, "name": "lr", "value": float(s)} for s in (8, 9, 10)]
    rec = Record(10, HEADS.empty(), scalars=columns(SCALARS, rows))
    write(WandbLogger(dir=tmp_path), info(), rec)
    (row,) = Recording(tmp_path).rows
    assert (row["attention/step"], row["attention/train/lr"]) == (10, 10)


@pytest.mark.parametrize("active", [True, False])
def test_shares_a_run_under_way_and_leaves_it_open(tmp_path: Path, active: bool) -> None:
    settings = wandb.Settings(console="off", silent=True)
    run = wandb.init(mode="offline", dir=str(tmp_path), settings=settings)
    run.log({"mine": 1}, step=500)
    write(WandbLogger(None if active else run), info(), record(10))
    run.log({"mine": 2}, step=501)
    run.finish()
    recording = Recording(tmp_path)
    mine = [(row["_step"], row["mine"]) for row in recording.rows if "mine" in row]
    assert mine[0] == (500, 1)
    assert mine[-1][1] == 2
    assert {row["attention/step"] for row in recording.rows if "attention/step" in row} == {10}
    (config,) = (r["config"] for r in recording.records if r["type"] == "config")
    assert "entropy_monitor" in json.dumps(config)


def test_survives_a_run_that_its_owner_finished_first(tmp_path: Path) -> None:
    settings = wandb.Settings(console="off", silent=True)
    run = wandb.init(mode="offline", dir=str(tmp_path), settings=settings)
    logger = WandbLogger(run)
    logger.open(info())
    logger.log(record(0))
    logger.log(record(10))
    run.finish()
    logger.close()
    assert len(Recording(tmp_path).rows) == 2


def test_writes_nothing_to_the_console(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from entropy_monitor.dashboards import WandbLogger\n"
        "from tests.dashboards.records_factory import info, record\n"
        "logger = WandbLogger(dir=sys.argv[1])\n"
        "logger.open(info()); logger.log(record(0)); logger.close(); logger.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert len(Recording(tmp_path).rows) == 1


def test_only_rank_0_logs_and_closing_twice_does_nothing(tmp_path: Path) -> None:
    logger = WandbLogger(dir=tmp_path / "w")
    write(logger, info(rank=1), record(0), event())
    logger.close()
    assert not (tmp_path / "w").exists()
    assert wandb.run is None


def test_refuses_a_wait_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="alert_wait is -5; give a number of seconds"):
        WandbLogger(alert_wait=-5)


def test_refuses_to_open_twice() -> None:
    logger = WandbLogger(mode="disabled")
    logger.open(info())
    with pytest.raises(ConfigurationError, match="already open; give each monitor a logger of its own"):
        logger.open(info())
    logger.close()


@pytest.mark.parametrize("option", ["heads_table_every", "heatmap_every", "histogram_every", "max_layers"])
def test_refuses_an_interval_that_is_none(option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option} is -1; give a whole number"):
        WandbLogger(**{option: -1})  # type: ignore[arg-type]

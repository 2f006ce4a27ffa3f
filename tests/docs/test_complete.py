"""Nothing is left out: columns, alerts, thresholds, evidence, public names; and it is said as it is."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
from configparser import ConfigParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import entropy_monitor as em
from entropy_monitor.analyzer.registry import DETECTORS
from entropy_monitor.records import HEADS, LAYERS, LEVELLED, LEVELS, SCALARS, TABLES, Alert, Table
from entropy_monitor.trackers.aggregates import HEAD_METRICS, LAYER_METRICS
from entropy_monitor.trackers.layer_choice import MAX_LAYERS
from tests.docs.alerts import shown
from tests.docs.pages import ALL, DOCS, ROOT, links, name_of, tables, words

METRICS, ALERTS, TRACKERS = DOCS / "metrics.md", DOCS / "alerts.md", DOCS / "how-to" / "trackers.md"
DEFAULTS = {field.name: field.default for field in dataclasses.fields(em.Thresholds)}


def coded(cell: str) -> list[str]:
    """The names in a cell that stand as code."""
    return re.findall(r"`([^`]+)`", cell)


# Columns


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_column_is_described(table: Table) -> None:
    found = tables(METRICS, "The tables")[TABLES.index(table)]
    assert [coded(row[0])[0] for row in found] == list(table.names)
    for name, unit, text in found:
        assert text
        of = table[coded(name)[0]]
        assert (unit == "nats") == ("nats" in of.doc or of.name == "entropy"), of.name


def test_the_tables_stand_in_their_order() -> None:
    assert TABLES == (HEADS, LAYERS, SCALARS)


def test_every_column_of_blocks_is_described() -> None:
    found = [coded(row[0])[0] for row in tables(METRICS, "The tables")[len(TABLES)]]
    assert found == [n for n in LEVELS.names if n.removesuffix("_low").removesuffix("_high") not in LEVELLED]
    (paragraph,) = (p for p in METRICS.read_text("utf-8").split("\n\n") if "two that are derived" in p)
    named = words(paragraph).partition("The figures are ")[2]
    assert [n for n in coded(named) if " " not in n] == list(LEVELLED)


def test_every_field_of_an_alert_is_described() -> None:
    found = tables(METRICS, "The tables")[len(TABLES) + 1]
    assert [coded(row[0])[0] for row in found] == [field.name for field in dataclasses.fields(Alert)]


# Metrics of trackers


def test_every_metric_is_described() -> None:
    """By its column, and by how heads are reduced to it."""
    _, of_heads = tables(TRACKERS, "The names")
    wanted = [[f"`{name}`", f"`{column}`", how] for name, (column, how) in HEAD_METRICS.items()]
    assert of_heads == wanted
    page = words(TRACKERS.read_text("utf-8"))
    sentence = page.partition("those of the layer as a whole: ")[2].partition(".")[0]
    assert coded(sentence) == list(LAYER_METRICS)
    assert f"more than {MAX_LAYERS} attention calls" in page


# Extras


def test_every_extra_is_described() -> None:
    (found,) = tables(DOCS / "start.md", "Install")
    described = {name for row in found for name in coded(row[0])}
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert described == set(config["options.extras_require"]) - {"docs", "test", "lint", "dev"}


# Notebooks and examples


def test_every_notebook_and_example_is_linked() -> None:
    linked = {(page.parent / target.partition("#")[0]).resolve() for page in ALL for _, target in links(page)}
    there = {*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "examples").glob("*.py")}
    assert there - linked == set()


# Alerts


def test_every_kind_of_alert_has_its_entry() -> None:
    (found,) = tables(ALERTS, "Alerts")
    assert {coded(row[0])[0] for row in found} == {detector.kind for detector in DETECTORS}
    assert len(found) == len(DETECTORS)


PARTS = (
    "What it means",
    "What it looks like",
    "The rule",
    "Causes",
    "What to do",
    "When it is harmless",
)


@pytest.mark.parametrize("kind", [detector.kind for detector in DETECTORS])
def test_an_entry_has_all_its_parts(kind: str) -> None:
    text = section(kind)
    assert [part for part in PARTS if f"**{part}.**" not in text] == []


@pytest.mark.parametrize("kind", [detector.kind for detector in DETECTORS])
def test_an_entry_shows_an_alert_as_it_is_worded(kind: str) -> None:
    alert, text = shown()[kind], words(section(kind))
    for part in (f"[{alert.severity}] {alert.title}", alert.message, alert.advice):
        assert part in text


def section(kind: str) -> str:
    """The entry of a kind."""
    heading = "## " + kind.replace("_", " ").capitalize()
    heading = heading.replace("Non finite", "Non-finite")
    page = ALERTS.read_text("utf-8")
    start = page.index(f"{heading}\n")
    return page[start : page.index("\n## ", start + 1)]


def test_every_figure_of_the_evidence_is_described() -> None:
    (found,) = tables(ALERTS, "Evidence")
    described = {name for row in found for name in coded(row[0])}
    gathered = {name for alert in shown().values() for name in alert.evidence}
    assert gathered - described == set()
    assert {"map", *(f"{n}_growth" for n in ("max_logit", "sigma_qk", "grad_linf"))} <= described


# Thresholds


def fields_doc() -> dict[str, str]:
    """What stands below each field in the code."""
    (cls,) = ast.parse(inspect.getsource(em.Thresholds)).body
    assert isinstance(cls, ast.ClassDef)
    found = {}
    for field, doc in itertools.pairwise(cls.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(doc, ast.Expr)
            found[field.target.id] = words(ast.literal_eval(doc.value))
    return found


def test_every_threshold_is_described_with_its_default() -> None:
    (found,) = tables(ALERTS, "Thresholds")
    docs = fields_doc()
    wanted = [[f"`{name}`", f"{default:g}", docs[name]] for name, default in DEFAULTS.items()]
    assert found == wanted


def test_every_threshold_decides_in_a_rule() -> None:
    page = words(ALERTS.read_text("utf-8").partition("\n## Thresholds\n")[0])
    assert [name for name in DEFAULTS if f"`{name}` (" not in page] == []


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_defaults_in_the_text_are_those_of_the_code(page: Path) -> None:
    for name, value in re.findall(r"`(\w+)` \((\.?\d[\d.]*)\)", words(page.read_text("utf-8"))):
        if name in DEFAULTS:
            assert float(value) == DEFAULTS[name], name


# Public names

MODULES = (
    "entropy_monitor",
    "entropy_monitor.analyzer",
    "entropy_monitor.dashboards",
    "entropy_monitor.figures",
    "entropy_monitor.measures",
    "entropy_monitor.remedies",
    "entropy_monitor.store",
)
OTHERS = (
    *(f"entropy_monitor.records.{n}" for n in ("HEADS", "LAYERS", "SCALARS", "TABLES", "Table", "Column")),
    "entropy_monitor.records.SEVERITIES",
    "entropy_monitor.records.severity_rank",
    "entropy_monitor.callbacks.huggingface.EntropyMonitorCallback",
    "entropy_monitor.callbacks.lightning.EntropyMonitorCallback",
    "entropy_monitor.callbacks.accelerate.attach",
)


@pytest.fixture(scope="module")
def described(inventory: set[str]) -> set[int]:
    """Every object that the reference describes, under whichever of its names."""
    return {id(found) for name in inventory if (found := resolved(name)) is not None}


def resolved(name: str) -> object:
    """The object of a dotted name; None for what only instances have."""
    first, *rest = name.split(".")
    found: Any = importlib.import_module(first)
    for part in rest:
        before = found
        found = getattr(found, part, None)  # a function before the module of its name, as for users
        if found is None and isinstance(before, ModuleType):
            found = importlib.import_module(f"{before.__name__}.{part}")
    return found


@pytest.mark.xdist_group("site")
@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module: str, described: set[int]) -> None:
    home = importlib.import_module(module)
    assert [name for name in home.__all__ if id(getattr(home, name)) not in described] == []


@pytest.mark.xdist_group("site")
@pytest.mark.parametrize("name", OTHERS)
def test_what_has_no_list_is_in_the_reference(name: str, inventory: set[str]) -> None:
    assert name in inventory

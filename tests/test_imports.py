"""Imports run one way, and `import entropy_monitor` stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "entropy_monitor"
HEAVY = (
    "plotly",
    "werkzeug",
    "wandb",
    "tensorboard",
    "matplotlib",
    "transformers",
    "lightning",
    "accelerate",
    "jinja2",
    "sklearn",
    "IPython",
)

# What each room may import of ours, beside itself.
RULES = {
    "errors": set[str](),
    "guard": set[str](),
    "phrases": set[str](),
    "schedule": set[str](),
    "cost": set[str](),
    "precision": {"records"},
    "plan": {"cost", "precision", "records", "schedule"},
    "records": {"errors"},
    "measures": {"errors"},
    "hooks": {"measures", "errors", "guard"},
    "analyzer": {"records", "errors", "phrases"},
    "store": {"records", "errors"},
    "remedies": {"hooks", "measures", "errors", "guard", "phrases", "looking", "undisturbed"},
    "figures": {"records", "errors", "run", "frames"},
    "trackers": {"records", "errors", "store"},
    "dashboards": {"records", "store", "run", "errors", "figures", "frames", "phrases", "trackers"},
    "step_report": {"records"},
    "delivery": {"records", "guard"},
    "scalars": {"records", "errors"},
    "run": {"store", "frames", "plots", "errors"},
    "plots": {"figures", "frames"},
    "frames": {"records", "errors"},
    "describe": set[str](),
    "processes": set[str](),
}
# The monitor and what it is made of: given its sinks, it knows no dashboard and no figure.
MONITOR = {
    "monitor",
    "pipeline",
    "alerting",
    "transfer",
    "options",
    "processes",
    "run_info",
    "delivery",
    "scalars",
    "looking",
    "recording",
    "coverage",
    "undisturbed",
}
FORBIDDEN_TO_MONITOR = {
    "dashboards",
    "figures",
    "run",
    "cli",
    "commands",
    "demo",
    "doctor",
    "callbacks",
    "remedies",
}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(source: str) -> set[str]:
    """Rooms that a file imports, at its top or within; what only type checking needs is left out."""
    tree = ast.parse(source)
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "entropy_monitor." if node.level else ""
            module = f"{base}{node.module or ''}"
            whole = module == "entropy_monitor"
            names |= {f"{module}.{alias.name}" if whole else module for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("entropy_monitor.")}


def violations(room: str, source: str) -> set[str]:
    found = imported(source) - {room}
    if room in RULES:
        return found - RULES[room]
    return found & FORBIDDEN_TO_MONITOR if room in MONITOR else set()


def sources() -> list[Path]:
    folders = os.walk(PACKAGE, followlinks=True)  # hooks and dashboards are links
    return sorted(
        Path(folder) / file for folder, _, files in folders for file in files if file.endswith(".py")
    )


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    assert violations(room_of(path), path.read_text()) == set()


def test_every_room_is_looked_at() -> None:
    rooms = {room_of(path) for path in sources()}
    assert (set(RULES) | MONITOR) <= rooms


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("measures", "from entropy_monitor.hooks import Watcher"),
        ("measures", "import entropy_monitor.records"),
        ("records", "from entropy_monitor import store"),
        ("hooks", "def f():\n    from entropy_monitor.analyzer import Analyzer"),
        ("analyzer", "from entropy_monitor.hooks.recorder import Harvest"),
        ("dashboards", "from entropy_monitor.monitor import EntropyMonitor"),
        ("monitor", "from entropy_monitor.dashboards import WandbLogger"),
        ("guard", "from . import errors"),
    ],
)
def test_a_planted_violation_is_found(room: str, line: str) -> None:
    assert violations(room, line)


def test_imports_for_types_alone_are_allowed() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from entropy_monitor.run import Run"
    assert violations("monitor", source) == set()


def loaded_by(statement: str, looked_for: tuple[str, ...] = HEAVY) -> set[str]:
    script = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(looked_for) & set(done.stdout.split())


@pytest.mark.parametrize(
    "name",
    [
        "entropy_monitor",
        "entropy_monitor.dashboards",
        "entropy_monitor.hooks",
        "entropy_monitor.callbacks",
        "entropy_monitor.doctor",
    ],
)
def test_the_import_is_light(name: str) -> None:
    assert loaded_by(f"import {name}") == set()


@pytest.mark.parametrize(
    "statement",
    [
        "import entropy_monitor",
        "from entropy_monitor import load_run",
        "from entropy_monitor.dashboards.run_view import RunView",
        "from entropy_monitor.cli import main; main(['check', 'nowhere'])",
    ],
)
def test_looking_at_a_run_does_not_load_torch(statement: str) -> None:
    assert loaded_by(statement, ("torch",)) == set()


def test_names_of_the_package_are_those_that_it_says() -> None:
    import entropy_monitor as em

    assert set(em.__all__) <= set(dir(em))
    assert all(getattr(em, name).__name__ == name for name in em.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        em.nothing  # noqa: B018


def test_a_planted_import_is_found() -> None:
    assert loaded_by("import entropy_monitor, jinja2") == {"jinja2"}

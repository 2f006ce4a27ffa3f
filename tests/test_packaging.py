"""What is built holds every room."""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed_for_the_wheel() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = set(config["options"]["packages"].split())
    homes = {"entropy_monitor": ROOT / "entropy_monitor"}
    homes |= {f"entropy_monitor.{name}": ROOT / name for name in ("hooks", "dashboards")}
    found = set[str]()
    for package, home in homes.items():  # links are not followed
        for init in home.rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(home).parts)))
    assert listed == found


def test_data_files_are_listed_for_the_wheel() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = config["options.package_data"]
    for package, folder in (("dashboards", "dashboards"), ("dashboards.web", "dashboards/web/static")):
        patterns = listed[f"entropy_monitor.{package}"].replace(" ", "").split(",")
        data = [p for p in (ROOT / folder).iterdir() if p.is_file() and p.suffix != ".py"]
        assert data
        for path in data:
            assert any(path.match(pattern) for pattern in patterns), path

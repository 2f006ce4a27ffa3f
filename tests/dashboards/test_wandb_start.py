"""How a run is started, against a stand-in for the module: what would `wandb.init` be told?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from entropy_monitor.dashboards.wandb_start import check_arguments, import_wandb, start_run
from entropy_monitor.errors import ConfigurationError
from tests.dashboards.records_factory import info


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def started(
    key: str | None = None, env_mode: str = "online", run_dir: str | None = None, **arguments: Any
) -> dict[str, Any]:
    told: dict[str, Any] = {}
    settings = SimpleNamespace(mode=env_mode, api_key=key, base_url="https://api.wandb.ai")
    stand_in = SimpleNamespace(
        setup=lambda: SimpleNamespace(settings=settings),
        Settings=lambda **kwargs: kwargs,
        init=lambda **kwargs: told.update(kwargs) or SimpleNamespace(dir="/x/files"),
    )
    given = {"project": "p", "name": None, "mode": None, "dir": None} | arguments
    start_run(stand_in, given, info(run_dir))
    return told


def test_offline_without_an_account() -> None:
    assert started()["mode"] == "offline"


def test_left_to_wandb_with_an_account() -> None:
    assert started(key="x")["mode"] is None
    assert started(settings={"api_key": "x"})["mode"] is None


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_what_the_user_chose_stands(mode: str) -> None:
    assert started(env_mode=mode)["mode"] is None
    assert started(mode=mode)["mode"] == mode
    assert started(settings=SimpleNamespace(mode=mode))["mode"] is None


def test_online_needs_an_account() -> None:
    with pytest.raises(
        ConfigurationError, match="found no W&B account; run `wandb login`, or leave mode out"
    ):
        started(mode="online")
    assert started(mode="online", key="x")["mode"] == "online"


def test_the_run_is_silent_and_named_after_its_directory() -> None:
    told = started(run_dir="runs/night-3", group="g")
    assert told["settings"] == {"console": "off", "silent": True}
    assert (told["name"], told["group"], told["project"]) == ("night-3", "g", "p")
    assert started(run_dir="runs/night-3", name="mine")["name"] == "mine"


def test_makes_the_folder_or_says_why_not(tmp_path: Path) -> None:
    assert started(dir=tmp_path / "a" / "b")["dir"] == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"cannot use dir .*file.*; give a folder to write to"):
        started(dir=tmp_path / "file")


def test_refuses_an_unknown_mode() -> None:
    with pytest.raises(
        ConfigurationError, match="mode is 'dry'; give one of online, offline, disabled, shared"
    ):
        check_arguments(None, {"mode": "dry"})


def test_refuses_what_is_no_run() -> None:
    with pytest.raises(
        ConfigurationError, match="run is a str without log, define_metric, alert, summary, config"
    ):
        check_arguments("run", {"mode": None})


def test_refuses_a_run_and_arguments_for_another() -> None:
    run = SimpleNamespace(log=0, define_metric=0, alert=0, summary=0, config=0)
    check_arguments(run, {"mode": None, "name": None})
    with pytest.raises(
        ConfigurationError, match="name, group would start a new W&B run, and run is already one"
    ):
        check_arguments(run, {"mode": None, "name": "n", "group": "g"})


@pytest.mark.parametrize(
    ("hide", "missing"),
    [("sys.modules['wandb'] = None", "wandb"), ("sys.modules['PIL'] = None", "pillow")],
)
def test_names_the_extra_when_a_package_is_missing(hide: str, missing: str) -> None:
    code = (
        f"import sys; {hide}\n"
        "from entropy_monitor.dashboards import WandbLogger\n"
        "from entropy_monitor.errors import MissingExtraError\n"
        "try: WandbLogger()\n"
        "except MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"needs {missing}, which is not installed: pip install 'entropy-monitor[wandb]'" in done.stdout


def test_a_folder_named_wandb_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    with pytest.raises(ImportError, match="WandbLogger needs wandb, which is not installed"):
        import_wandb(images=False)

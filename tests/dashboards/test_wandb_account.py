from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from entropy_monitor.dashboards.wandb_account import has_account

SAAS = SimpleNamespace(base_url="https://api.wandb.ai", api_key=None)


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_there_is_none() -> None:
    assert not has_account(SAAS)
    assert not has_account(None)
    assert not has_account(SimpleNamespace())


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_the_environment_has_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "x")
    assert has_account(SAAS)


@pytest.mark.parametrize("name", ["api_key", "identity_token_file"])
def test_the_settings_have_one(name: str) -> None:
    assert has_account(SimpleNamespace(base_url=SAAS.base_url, **{name: "x"}))


@pytest.mark.parametrize("file", [".netrc", "_netrc", "elsewhere"])
@pytest.mark.parametrize("url", ["https://api.wandb.ai", "https://api.forge.coreweave.com"])
def test_the_netrc_file_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, url: str) -> None:
    (tmp_path / file).write_text("machine api.wandb.ai login user password x\n")
    if file == "elsewhere":
        monkeypatch.setenv("NETRC", str(tmp_path / file))
    assert has_account(SimpleNamespace(base_url=url))


@pytest.mark.parametrize(
    "netrc",
    [
        "machine example.org login user password x\n",
        "machine api.wandb.ai login user password\n",
        "machine\n",
        "",
    ],
)
def test_the_netrc_file_has_none(tmp_path: Path, netrc: str) -> None:
    (tmp_path / ".netrc").write_text(netrc)
    assert not has_account(SAAS)


def test_a_key_for_the_service_does_not_open_a_private_server(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    assert not has_account(SimpleNamespace(base_url="https://wandb.example.org"))

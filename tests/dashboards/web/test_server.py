"""`serve`: where it listens, what it says, how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entropy_monitor.dashboards.web import serve, server
from entropy_monitor.errors import ConfigurationError
from tests.dashboards.web.written_runs import write_run


class Stopped(Exception):
    """Ends `serve` before it serves."""


def stop(*_: Any) -> None:
    raise Stopped


def ready(folder: Path, **options: Any) -> str:
    """The address that `serve` says, ended there."""
    said: list[str] = []

    def on_ready(address: str) -> None:
        said.append(address)
        raise Stopped

    with pytest.raises(Stopped):
        serve(folder, on_ready=on_ready, **options)
    return said[0]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX only: signals")
def test_it_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0])
    script = (
        "import sys; from entropy_monitor.dashboards.web import serve; "
        "serve(sys.argv[1], port=0, on_ready=lambda address: print(address, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address + "api/runs", timeout=60) as answer:
            assert answer.status == 200
            assert answer.headers["Server"].strip() == "entropy-monitor"
            assert b'"id":"a"' in answer.read()
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out, errors) == (0, "", "")
    finally:
        process.kill()
        process.communicate()


def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[server._Server, Callable[[], None]]:
    """A server that runs in a thread, and what ends it."""
    made: list[server._Server] = []
    is_up = threading.Event()
    forever = server._Server.serve_forever

    def noted(self: server._Server, poll_interval: float = 0.05) -> None:
        made.append(self)
        is_up.set()
        forever(self, poll_interval)

    monkeypatch.setattr(server._Server, "serve_forever", noted)
    thread = threading.Thread(target=serve, args=(folder,), kwargs={"port": 0}, daemon=True)
    thread.start()
    assert is_up.wait(60)

    def end() -> None:
        made[0].shutdown()
        thread.join(60)
        assert not thread.is_alive()

    return made[0], end


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS greeting
        b"GET /%zz%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
    ],
)
def test_what_is_no_request_ends_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], request_bytes: bytes
) -> None:
    running, end = serving(tmp_path, monkeypatch)
    try:
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
            connection.sendall(request_bytes)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert b"Traceback" not in answer
        with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/api/runs", timeout=30) as answer_after:
            assert answer_after.status == 200
    finally:
        end()
    assert "Traceback" not in capfd.readouterr().err


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"port {port}: .*choose another port"):
            serve(tmp_path, port=port)


@pytest.mark.parametrize(
    ("path", "options", "says"),
    [
        ("missing", {}, "does not exist"),
        ("file", {}, "is a file"),
        (".", {"port": 70_000}, "70000"),
        (".", {"port": -1}, "-1"),
        (".", {"host": "no.such.host.invalid"}, "no.such.host.invalid"),
        (".", {"host": "192.0.2.7", "port": 0}, "192.0.2.7"),
    ],
)
def test_what_cannot_be_served_is_told(tmp_path: Path, path: str, options: dict[str, Any], says: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=says):
        serve(tmp_path / path, **options)


def test_it_listens_on_this_machine_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ready(tmp_path, port=0).startswith("http://127.0.0.1:")
    assert not caplog.records


def test_another_address_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ready(tmp_path, port=0, host="0.0.0.0").startswith("http://127.0.0.1:")
    assert "no password" in caplog.text
    assert str(tmp_path) in caplog.text


def test_the_browser_is_opened_where_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    is_open = threading.Event()

    def opens(address: str) -> None:
        opened.append(address)
        is_open.set()

    monkeypatch.setattr(server.webbrowser, "open", opens)
    monkeypatch.setattr(server._Server, "serve_forever", stop)
    with pytest.raises(Stopped):
        serve(tmp_path, port=0, open_browser=True)
    assert is_open.wait(30)
    assert opened[0].startswith("http://127.0.0.1:")

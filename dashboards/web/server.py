"""`serve`: the page on this machine, until it is stopped."""

from __future__ import annotations

import logging
import os
import socket
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from entropy_monitor.dashboards.web.app import create_app
from entropy_monitor.dashboards.web.security import is_loopback
from entropy_monitor.errors import ConfigurationError

logger = logging.getLogger("entropy_monitor")

_WAITING = 128
"""Connections that may wait to be taken."""


def serve(
    path: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 6007,
    open_browser: bool = False,
    on_ready: Callable[[str], object] | None = None,
) -> None:
    """Serves the page about a run, or about all runs below a folder, until a KeyboardInterrupt.

    Runs may grow and new ones appear meanwhile. Nothing is written, and nothing outside of `path` is read.

    Args:
        path: a run directory, or a folder of them.
        host: address to listen at. Another one than this machine's own lets everyone who reaches it read
            the runs, without a password; a warning says so.
        port: to listen at; 0 takes a free one.
        open_browser: whether to open the page in the default browser.
        on_ready: called with the page's address once it can be asked for.

    Raises:
        MissingExtraError: plotly is not installed.
        ConfigurationError: `path` is no folder, or `host` and `port` cannot be listened at.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigurationError(f"{folder} {what}; give a run directory, or a folder of them")
    app = create_app(folder, loopback_only=is_loopback(host))
    with _listening(host, port) as listener:
        server = _Server(host, port, app, _Handler, fd=listener.fileno())
    address = _address(host, server.port)
    if not is_loopback(host):
        logger.warning(
            "entropy-monitor: the page listens at %s: whoever reaches this machine there can read the runs "
            "in %s. There is no password. Without a host it listens on this machine alone.",
            host,
            folder,
        )
    app.read_ahead()
    try:
        if on_ready is not None:
            on_ready(address)
        if open_browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.serve_forever()
    finally:
        app.close()


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Werkzeug would end the process where it cannot."""
    if not 0 <= port <= 65535:
        raise ConfigurationError(f"port must be 0 to 65535; it is {port}")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigurationError(
            f"host is {host!r}, which cannot be listened at: {error.strerror}"
        ) from error
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_WAITING)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen at {host}, port {port}: {error.strerror}; choose another port, "
            "or 0 for a free one"
        ) from error
    return listener


def _address(host: str, port: int) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)  # noqa: S104
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/"


class _Server(ThreadedWSGIServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A connection that broke off is no event."""
        logger.debug("entropy-monitor: a connection from %s broke off", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    """Quiet: a page that asks every few seconds would fill a terminal; and names no versions."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that an idle connection keeps its thread
    server_version = "entropy-monitor"
    sys_version = ""

    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002, ARG002
        """Errors are the app's to log."""
        logger.debug(message, *args)

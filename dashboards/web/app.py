"""The WSGI app: which path leads where, and what an answer looks like, a failed one too."""

from __future__ import annotations

import gzip
import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from werkzeug import Request, Response
from werkzeug.exceptions import HTTPException

from entropy_monitor.dashboards.packing import pack
from entropy_monitor.dashboards.web import security
from entropy_monitor.dashboards.web.api import Api
from entropy_monitor.dashboards.web.assets import Asset, static_assets
from entropy_monitor.dashboards.web.library import Library, UnknownRunError
from entropy_monitor.errors import EntropyMonitorError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logger = logging.getLogger("entropy_monitor")

_WORTH_COMPRESSING = 8192  # bytes
_LONGEST_QUERY = 8192
_READ_AHEAD = 60.0  # seconds that are spent on runs nobody asked for yet


def create_app(
    root: str | os.PathLike[str],
    *,
    refresh: float = 2.0,
    loopback_only: bool = False,
    framed: bool = False,
) -> App:
    """The page about the runs at and below a folder, as a WSGI app.

    It answers GET and HEAD only, and serves its own files, plotly's script and what `RunView` says of the
    runs that it found by itself; no path in a request ever reaches the disk.

    Args:
        root: the folder.
        refresh: seconds for which what was read counts as fresh.
        loopback_only: answer only requests that name this machine in their `Host` header.
        framed: whether pages of the same server may show it in a frame.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    return App(Library(root, refresh=refresh), loopback_only=loopback_only, framed=framed)


class App:
    """What `create_app` returns: call it as WSGI says."""

    def __init__(self, library: Library, *, loopback_only: bool, framed: bool) -> None:
        self._library = library
        self._ahead: threading.Thread | None = None
        self._stop = threading.Event()
        self._api = Api(library)
        self._assets = static_assets()
        self._loopback_only = loopback_only
        self._headers = security.headers(framed=framed)

    def read_ahead(self) -> None:
        """Begin to read the runs at once, before anybody asks; `close` ends it."""
        self._ahead = threading.Thread(
            target=self._library.cards, args=(_READ_AHEAD, self._stop), daemon=True
        )
        self._ahead.start()

    def close(self) -> None:
        """End reading ahead. A process that ends while a thread of it decodes is aborted."""
        self._stop.set()
        if self._ahead is not None:
            self._ahead.join()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answers a request; whatever happens, with a response."""
        request = Request(environ)
        try:
            response = self._answer(request)
        except HTTPException as error:  # werkzeug's word on a request that cannot be read
            response = _failure(error.code or 400, error.description or error.name)
        except Exception:
            logger.exception("entropy-monitor: the page's request %r failed", request.path)
            response = _failure(500, "the server failed to answer; its log says why")
        response.headers.update(self._headers)
        return response(environ, start_response)

    def _answer(self, request: Request) -> Response:
        if self._loopback_only and not security.asks_for_this_machine(request):
            return _failure(
                403,
                "this server answers to localhost only: open it as http://localhost, forward its port, or "
                "start it with the host that others shall reach it by",
            )
        if request.method not in ("GET", "HEAD"):
            response = _failure(405, f"{request.method[:20]} is not allowed; ask with GET")
            response.headers["Allow"] = "GET, HEAD"
            return response
        if len(request.query_string) > _LONGEST_QUERY:
            return _failure(414, f"the query is longer than {_LONGEST_QUERY:,} bytes")
        kind, _, name = request.path.lstrip("/").partition("/")
        if kind in ("", "index.html") and not name:
            return _file(request, self._assets["index.html"])
        if kind == "static" and name in self._assets:
            return _file(request, self._assets[name])
        if kind == "api" and self._api.knows(name):
            return self._data(request, name)
        return _failure(404, "there is nothing at this address")

    def _data(self, request: Request, name: str) -> Response:
        try:
            answer = self._api.answer(name, request.args)
        except UnknownRunError:
            return _failure(404, "there is no such run; it may have been moved or deleted")
        except EntropyMonitorError as error:
            return _failure(400, str(error))
        body = pack(answer)
        response = Response(content_type="application/octet-stream")
        response.headers["Cache-Control"] = "no-store"
        return _filled(request, response, body, lambda: gzip.compress(body, compresslevel=1, mtime=0))


def _file(request: Request, asset: Asset) -> Response:
    response = Response(content_type=asset.content_type)
    response.headers["Cache-Control"] = "no-cache"  # kept, and asked for again: a new version shows at once
    response.set_etag(asset.etag)
    _filled(request, response, asset.data, lambda: asset.compressed)
    return response.make_conditional(request)


def _filled(request: Request, response: Response, body: bytes, compress: Callable[[], bytes]) -> Response:
    """The response with its body, compressed where that is worth it and the browser takes it."""
    response.headers["Vary"] = "Accept-Encoding"
    if len(body) >= _WORTH_COMPRESSING and request.accept_encodings.quality("gzip") > 0:
        body = compress()
        response.headers["Content-Encoding"] = "gzip"
    response.set_data(body)
    return response


def _failure(status: int, text: str) -> Response:
    response = Response(json.dumps({"error": text}), status=status, content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response

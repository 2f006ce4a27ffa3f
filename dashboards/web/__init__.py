"""The page in a browser: what a folder of runs holds, also while they grow.

One WSGI app behind two doors: `serve` answers on this machine, and `dashboards/tensorboard_plugin.py` shows
the same page as a tab of TensorBoard.

| file | what it does |
|---|---|
| `library.py` | finds the runs of a folder and keeps what was read of them |
| `api.py` | a request's parameters in, a packed answer out |
| `assets.py`, `joined.py` | the page's own files, plotly's script; all modules as one script |
| `app.py`, `security.py` | routes, errors, headers, who may ask |
| `server.py` | `serve` |
| `static/` | the page: one ES module a part, no build step; `static/source_http.js` is where it asks |

It needs the extra `web`: `pip install 'entropy-monitor[web]'`.
"""

from __future__ import annotations

from entropy_monitor.errors import MissingExtraError

try:
    import werkzeug  # noqa: F401
except ImportError as error:
    raise MissingExtraError("werkzeug", "web", "the page in a browser") from error

from entropy_monitor.dashboards.web.app import create_app
from entropy_monitor.dashboards.web.server import serve

__all__ = ["create_app", "serve"]

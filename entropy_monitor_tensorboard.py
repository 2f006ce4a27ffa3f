"""What TensorBoard loads for its tab "Attention", through the entry point `tensorboard_plugins`.

TensorBoard loads every installed plugin in every start, and does not start where one cannot be loaded. So
this stands outside of the package, whose import brings torch along: it needs TensorBoard alone, and the
package is loaded once the tab has something to show. What the tab shows is made by
`entropy_monitor.dashboards.tensorboard_plugin`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tensorboard.plugins import base_plugin
from werkzeug import Response

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger("entropy_monitor")

_NAME = "entropy_monitor"
_DEEPEST = 6
_MOST_FOLDERS = 2000
"""Folders looked into to tell whether there is a run: this is asked with every reload of TensorBoard."""


class AttentionPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """The tab "Attention": the runs at and below TensorBoard's `--logdir`.

    Args:
        context: TensorBoard's; of it only `logdir` is used.
    """

    plugin_name = _NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        super().__init__(context)
        self._logdir = Path(context.logdir).expanduser() if context.logdir else None
        self._lock = threading.Lock()
        self._loaded: WSGIApplication | None = None

    def get_plugin_apps(self) -> dict[str, WSGIApplication]:
        """One app for all that lies below the plugin's path."""
        return {"/*": self._serve}

    def is_active(self) -> bool:
        """Whether there is a run to show; if so, what shows it is loaded meanwhile."""
        found = self._logdir is not None and holds_a_run(self._logdir)
        if found:
            threading.Thread(target=self._app, daemon=True).start()
        return found

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """The tab's name and script. The page asks by itself for what is new."""
        return base_plugin.FrontendMetadata(
            es_module_path="/static/tensorboard.js", tab_name="Attention", disable_reload=True
        )

    def _app(self) -> WSGIApplication:
        """What shows the tab, loaded when it is first asked for."""
        with self._lock:
            if self._loaded is None:
                try:
                    from entropy_monitor.dashboards.tensorboard_plugin import tab_app

                    self._loaded = tab_app(self._logdir, f"/data/plugin/{_NAME}")
                except Exception as error:  # noqa: BLE001  whatever it is, TensorBoard shall go on
                    logger.warning("entropy-monitor: the tab Attention cannot be shown: %s", error)
                    self._loaded = _only_says(str(error))
            return self._loaded

    def _serve(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return self._app()(environ, start_response)


def holds_a_run(folder: Path) -> bool:
    """Whether `run.json` lies in the folder or, not too deep, below it; shallow folders are asked first."""
    level, looked = [str(folder)], 0
    for _ in range(_DEEPEST + 1):
        below: list[str] = []
        for path in level:
            looked += 1
            try:
                with os.scandir(path) as entries:
                    for entry in entries:
                        if entry.name == "run.json":
                            return True
                        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                            below.append(entry.path)
            except OSError:
                continue  # not there yet, or not ours to read
            if looked >= _MOST_FOLDERS:
                return False
        level = below
    return False


def _only_says(text: str) -> WSGIApplication:
    """A tab that shows a text: what is missing, and how to get it."""
    script = f"export function render() {{ document.body.textContent = {json.dumps(text)}; }}"
    return Response(script, content_type="text/javascript", headers={"X-Content-Type-Options": "nosniff"})

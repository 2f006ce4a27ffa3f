"""The page behind TensorBoard's tab "Attention".

`entropy_monitor_tensorboard` is what TensorBoard loads at its start; it asks for this when the tab has
something to show.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_monitor.dashboards.web import create_app
from entropy_monitor.errors import ConfigurationError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def tab_app(logdir: Path | None, prefix: str) -> WSGIApplication:
    """The page about the runs at and below TensorBoard's `--logdir`.

    Who may ask is TensorBoard's to say; the page may stand in its frame.

    Args:
        logdir: the folder, None where TensorBoard was started without one.
        prefix: where TensorBoard shows the plugin; it leaves this in the path of every request.

    Raises:
        MissingExtraError: plotly is not installed.
        ConfigurationError: there is no folder.
    """
    if logdir is None:
        raise ConfigurationError("start TensorBoard with --logdir FOLDER, a folder of run directories")
    app = create_app(logdir, framed=True)

    def below(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "").removeprefix(prefix)
        moved = {**environ, "SCRIPT_NAME": environ.get("SCRIPT_NAME", "") + prefix, "PATH_INFO": path}
        return app(moved, start_response)

    return below

"""The page's own files, and plotly's script out of the installed package: nothing comes from elsewhere."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources, util
from pathlib import Path

from entropy_monitor.errors import MissingExtraError

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Asset:
    """A file as it is sent."""

    data: bytes
    content_type: str

    @cached_property
    def etag(self) -> str:
        """Changes with the content."""
        return hashlib.sha256(self.data).hexdigest()[:20]

    @cached_property
    def compressed(self) -> bytes:
        """The same in gzip's form."""
        return gzip.compress(self.data, compresslevel=5, mtime=0)


def static_text(name: str) -> str:
    """A file of `static/` as text."""
    return resources.files(__package__).joinpath("static", name).read_text("utf-8")


@cache
def static_assets() -> dict[str, Asset]:
    """The files of `static/` by name, and plotly's script as `plotly.js`.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    found = {"plotly.js": Asset(plotly_script(), _TYPES[".js"])}
    for path in resources.files(__package__).joinpath("static").iterdir():
        kind = _TYPES.get(Path(path.name).suffix)
        if kind is not None:
            found[path.name] = Asset(path.read_bytes(), kind)
    return found


def plotly_script() -> bytes:
    """Plotly's minified script, as the Python package `plotly` brings it.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    spec = util.find_spec("plotly")  # importing it would take longer than reading one file of it
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place, "package_data", "plotly.min.js")
        if path.is_file():
            return path.read_bytes()
    raise MissingExtraError("plotly", "web", "the page in a browser")

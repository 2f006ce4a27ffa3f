"""How the pages of this folder become a site: `make site`, which needs no network and makes none needed.

Formulas become MathML, which browsers draw themselves: no script, no font, nothing from another host.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

import entropy_monitor

project = "entropy-monitor"
author = "the authors of entropy-monitor"
release = version = entropy_monitor.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# Every type of ours that a signature names must be described. What other packages define is named, not
# linked: links would need their inventories from the network.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!entropy_monitor\.).*")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

# Docstrings are written for readers of the source: `name` is code, in the Google style.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "entropy-monitor"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"

logger = logging.getLogger(__name__)

_DOCS = Path(__file__).parent
_COLON = "\0"
_LINK = re.compile(r"\]\((\.\.?/[^)#\s]*)\)")


def _draw(as_block: bool) -> Callable[[Any, nodes.Element], None]:
    def visit(writer: Any, node: nodes.Element) -> None:
        try:
            text = tex2mathml(node.astext(), as_block=as_block)
        except MathError as error:
            logger.warning("formula %r: %s", node.astext(), error, location=node)
            text = ""
        writer.body.append(f'<div class="math">{text}</div>' if as_block else text)
        raise nodes.SkipNode

    return visit


def _link_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to files of the project that are no pages: the site holds copies of them."""
    here = Path(app.env.doc2path(page)).parent

    def link(found: re.Match[str]) -> str:
        path = (here / found[1]).resolve()
        is_page = path.is_relative_to(_DOCS) and path.suffix == ".md"
        return found[0] if is_page else f"](path:{found[1]})"

    source[0] = _LINK.sub(link, source[0])


def _hide_colon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes an attribute's first line up to a colon for its type; ours are sentences."""
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(":", _COLON)


def _show_colon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def _is_left_out(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Fields of named tuples say nothing beyond their class's own list of them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx of the above."""
    app.add_html_math_renderer("mathml", (_draw(False), None), (_draw(True), None))
    app.connect("source-read", _link_files)
    app.connect("autodoc-process-docstring", _hide_colon, priority=1)
    app.connect("autodoc-process-docstring", _show_colon, priority=999)
    app.connect("autodoc-skip-member", _is_left_out)
    return {"parallel_read_safe": True}

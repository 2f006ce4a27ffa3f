"""The page's modules as one script: a page that is opened from a file cannot import others."""

from __future__ import annotations

import re
from collections.abc import Callable

_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([a-z_]+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const|let) (\w+))", re.MULTILINE)


def joined_modules(entry: str, read: Callable[[str], str]) -> str:
    """`entry` and all that it imports, each in a function of its own, in the order in which they are needed.

    Modules name what they import (`import { a, b as c } from "./other.js";`) and export declarations; of
    the language's other forms none is understood.

    Args:
        entry: name of the module to start with, without `.js`.
        read: gives a module's text.

    Raises:
        ValueError: a module imports or exports in another form, or modules import each other in a circle.
    """
    done: dict[str, str] = {}
    _add(entry, read, done, ())
    return "\n".join(done.values())


def _add(name: str, read: Callable[[str], str], done: dict[str, str], above: tuple[str, ...]) -> None:
    if name in above:
        raise ValueError(f"modules import each other in a circle: {' -> '.join([*above, name])}")
    if name in done:
        return
    text = read(name)
    for match in _IMPORT.finditer(text):
        _add(match[2], read, done, (*above, name))
    text = _IMPORT.sub(_taken, text)
    exported = _EXPORT.findall(text)
    text = _EXPORT.sub("", text)
    left = re.search(r"^(?:import|export)\b.*$", text, re.MULTILINE)
    if left:
        raise ValueError(f"{name}.js has a form of import or export that cannot be joined: {left[0]}")
    done[name] = f"const module_{name} = (() => {{\n{text}\nreturn {{ {', '.join(exported)} }};\n}})();"


def _taken(match: re.Match[str]) -> str:
    names = ", ".join(name.strip().replace(" as ", ": ") for name in match[1].split(",") if name.strip())
    return f"const {{ {names} }} = module_{match[2]};\n"

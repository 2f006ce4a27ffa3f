"""The page's modules as one script."""

from __future__ import annotations

import re

import pytest

from entropy_monitor.dashboards.web.assets import static_text
from entropy_monitor.dashboards.web.joined import joined_modules


def joined(**modules: str) -> str:
    return joined_modules("main", modules.__getitem__)


def test_what_is_needed_comes_first_and_once() -> None:
    text = joined(
        main='import { a, b as c } from "./one.js";\nimport { d } from "./two.js";\na(c, d);\n',
        one='import { d } from "./two.js";\nexport function a() {}\nexport const b = d;\n',
        two="export class d {}\nconst kept = 1;\n",
    )
    assert re.findall(r"const module_(\w+) =", text) == ["two", "one", "main"]
    assert "const { a, b: c } = module_one;" in text
    assert "return { a, b };" in text
    assert "import" not in text
    assert "export" not in text


def test_a_circle_and_other_forms_are_refused() -> None:
    with pytest.raises(ValueError, match="circle: main -> one -> main"):
        joined(main='import { a } from "./one.js";\n', one='import { b } from "./main.js";\n')
    others = ('import "./one.js";', 'import * as one from "./one.js";', "export default 3;", "export { a };")
    for line in others:
        with pytest.raises(ValueError, match="cannot be joined"):
            joined(main=f"{line}\n")


@pytest.mark.parametrize("entry", ["page", "report", "tensorboard"])
def test_the_page_can_be_joined(entry: str) -> None:
    text = joined_modules(entry, lambda name: static_text(f"{name}.js"))
    assert not re.search(r"^(?:import|export)\b", text, re.MULTILINE)
    names = re.findall(r"^const module_(\w+) =", text, re.MULTILINE)
    assert names[-1] == entry
    assert len(names) == len(set(names)) > 5

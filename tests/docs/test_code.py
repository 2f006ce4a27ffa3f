"""The code on the pages runs, in the order in which it stands."""

from __future__ import annotations

import re
import shlex
from configparser import ConfigParser
from pathlib import Path

import pytest

from entropy_monitor import cli
from tests.docs import scene
from tests.docs.pages import ALL, ROOT, Code, code, name_of

REASONS = ("needs polars", "needs mlflow", "needs a W&B account")
"""Why code may be left out."""

LANGUAGES = {"python", "sh", "text", "", "{toctree}", "{eval-rst}", "sql", "json"}

# Of commands on the pages that are not run: that they are what is there is asked instead.
OTHERS = ("make", "pip", "python", "tensorboard", "torchrun", "wandb", "accelerate", "cd", "git")


def runnable(page: Path) -> list[Code]:
    return [block for block in code(page, "python", "sh") if block.mark != "not run"]


PAGES = [page for page in ALL if runnable(page)]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "runs"
    scene.record_runs(folder)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_it_runs(page: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with scene.place(tmp_path):
        current = "tiny"
        names = scene.names(current, runs)
        for block in runnable(page):
            if block.mark in ("anew", "setup"):
                current = block.of or current
                names = scene.names(current, runs)
            if block.language == "sh":
                run_commands(block)
            else:
                run_python(block, names)


def run_python(block: Code, names: scene.Names) -> None:
    source = "\n" * block.line + block.text  # errors tell the page's own line
    exec(compile(source, str(block.page), "exec", dont_inherit=True), names)


def run_commands(block: Code) -> None:
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        where = f"{name_of(block.page)}:{block.line}: {line}"
        if words[0] == "entropy-monitor":
            run_ours([name for word in words[1:] for name in expanded(word)], where)
        else:
            assert words[0] in OTHERS, f"{where}: what is this?"
            ask(words, where)


def expanded(word: str) -> list[str]:
    """What a shell makes of a word."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def run_ours(words: list[str], where: str) -> None:
    """Run a command; those that take long or do not end are only parsed."""
    if words[0] in ("serve", "demo"):
        cli._parser().parse_args(words)
    else:
        assert cli.main(words) in (0, 1), where


def ask(words: list[str], where: str) -> None:
    """Whether a command of another program names what is there."""
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
        assert set(words[1:]) <= targets, where
    for extras in re.findall(r"(?:entropy-monitor|\.)\[([\w,-]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known_extras()), where
    for word in words[1:]:
        if word.startswith(("examples/", "benchmarks/")):
            assert (ROOT / word).is_file(), where


def known_extras() -> list[str]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return list(config["options.extras_require"])


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_what_is_left_out_has_a_reason(page: Path) -> None:
    for block in code(page, *LANGUAGES):
        assert block.mark != "not run" or block.of in REASONS, block
        assert block.mark != "setup" or block.of in scene.SCENES, block
    fences = re.findall(r"^```(\S.*)$", page.read_text("utf-8"), re.MULTILINE)
    assert set(fences) <= LANGUAGES


def test_an_error_in_the_code_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```python\nx + missing\n```\n", "utf-8")
    first, second = code(page, "python")
    names: scene.Names = {}
    run_python(first, names)
    with pytest.raises(NameError) as caught:
        run_python(second, names)
    assert caught.traceback[-1].lineno + 1 == 8


@pytest.mark.parametrize(
    "line",
    ["entropy-monitor report", "rm -rf x", "make tea", "pip install '.[tea]'", "python examples/tea.py"],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        run_commands(Code(ROOT / "README.md", 1, "sh", line))

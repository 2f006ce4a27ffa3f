"""Every notebook runs from top to bottom on a run of the demonstration, and is kept without outputs."""

from __future__ import annotations

import base64
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import Demo

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

pytestmark = pytest.mark.xdist_group("demo")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("name", ["too-fast", "sound"])
def test_it_runs(path: Path, name: str, demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MONITOR_RUN", str(demo.folder / name))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    assert all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    text = "\n".join(o.get("text", "") for o in outputs if o["output_type"] == "stream")
    assert ("What to do:" in text) == (name == "too-fast")
    if name == "sound":
        assert "No alert" in text
    assert not [o["text"] for o in outputs if o.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_there_is_one() -> None:
    assert NOTEBOOKS

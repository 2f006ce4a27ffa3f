"""The benchmarks run as their first lines say; what they find is not judged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_examples import ROOT, run


def benchmark(name: str) -> str:
    """Where it lies."""
    return str(ROOT / "benchmarks" / f"{name}.py")


def test_remedies_prints_ratios() -> None:
    out = run(benchmark("remedies"), "--smoke", "--rounds", "2", "--eager-only")
    assert out.count("| smoke | eager |") == 2


def test_proposition_3_2_holds_its_bound() -> None:
    out = run(
        benchmark("proposition_3_2"),
        "--widths",
        "16",
        "64",
        "--steps",
        "1",
        "--samples",
        "8",
        "--seeds",
        "1",
    )
    assert "in all 2 cases: True" in out
    assert out.count("| exponent |") == 1


def test_cures_prints_a_line_a_run() -> None:
    out = run(benchmark("cures"), "1", "--steps", "3")
    assert len(out.splitlines()) == 2 + 8


def test_loggers_prints_a_line_a_logger_and_shape() -> None:
    lines = run(benchmark("loggers"), "--records", "2", "--max-layers", "3").splitlines()
    assert len(lines) == 1 + 6
    assert all(re.search(r"   58 scalars .* kB .* ms, at most ", line) for line in lines[1:])


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of every row of Markdown tables, by the first cell; those of a later table take over."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


CONTENDERS = {
    "attention written out, maps returned",
    "extra forward with maps",
    "torch-module-monitor",
    "ours, rows=32",
    'ours, rows="auto"',
    'ours, rows="all"',
}
INSTALLED = CONTENDERS - {"torch-module-monitor"}  # which is optional
PLAIN = {"plain", "plain again"}
HEAD = {"contender", "---"}


@pytest.fixture(scope="module")
def cost() -> list[str]:
    """What the benchmark of costs prints in its smallest form: times, errors and effects."""
    out = run(benchmark("cost"), "--smoke")
    assert out.splitlines()[0].count("torch ") == 1
    return re.split("Errors in nats|## What else", out)


def samples(cell: str) -> int:
    """How many a cell with a median and quartiles is made of."""
    found = re.fullmatch(r"(\S+) \((\S+) … (\S+); (\d+)\)", cell)
    assert found is not None, cell
    middle, low, high = map(float, found.groups()[:3])
    assert 0 < low <= middle <= high
    return int(found[4])


@pytest.mark.xdist_group("cost")
def test_cost_times_steps_of_each_kind_apart(cost: list[str]) -> None:
    rows = rows_of(cost[0])
    assert set(rows) == CONTENDERS | PLAIN | HEAD
    for name in INSTALLED | PLAIN:
        read, alone, in_full, between, _, memory = rows[name]
        ours = name.startswith("ours")
        assert read == ("–" if name in PLAIN else "32")  # all of them
        split = ours or name in PLAIN
        assert samples(alone) == (2 if split else 4)  # of 4 rounds
        assert samples(in_full) == 2 if split else in_full == "–"
        assert samples(between) == 4
        assert int(memory) >= -100


@pytest.mark.xdist_group("cost")
def test_cost_of_plain_steps_is_one(cost: list[str]) -> None:
    rows = rows_of(cost[0])
    one = "1.000 (1.000 … 1.000"
    assert all(cell.startswith(one) for cell in rows["plain"][1:5])
    for name in INSTALLED | {"plain again"}:
        middle, low, high = (float(n) for n in re.findall(r"[\d.]+", rows[name][4]))
        assert 0 < low <= middle <= high


@pytest.mark.xdist_group("cost")
def test_cost_prints_errors_of_trained_and_collapsed_models(cost: list[str]) -> None:
    rows = rows_of(cost[1])
    assert set(rows) == CONTENDERS | HEAD
    for name in INSTALLED:
        read, *errors = rows[name]
        assert read == "32"
        for error in errors:
            assert float(error.split("/")[0]) < 0.05, name
    few, most = re.search(r"(\d+) of (\d+) heads are below 10%", cost[1]).groups()  # type: ignore[union-attr]
    assert 2 * int(few) >= int(most)
    assert rows["contender"][2] == f"{few} heads collapsed"


@pytest.mark.xdist_group("cost")
def test_cost_prints_what_watching_does_to_the_training(cost: list[str]) -> None:
    rows = rows_of(cost[2])
    assert set(rows) == CONTENDERS | HEAD
    for name in INSTALLED:
        if name.startswith("ours"):
            assert "bit-identical" not in rows[name][0]
            assert "random state" not in rows[name][0]
    assert "not bit-identical" in rows["attention written out, maps returned"][0]


def test_scale_prints_its_tables_and_draws_them(tmp_path: Path) -> None:
    picture = tmp_path / "scale.png"
    out = run(benchmark("scale"), "--smoke", "-o", str(picture))
    rows = rows_of(out)
    assert {"64", "128", "10", "20", "1", "2", "100", "1,000"} <= set(rows)
    assert rows["1,000"][0] == "9,600"
    assert out.count("exponent (expected)") == 4
    assert out.count("| 32 rows alone, ms | 32 rows, in full, ms | all rows alone, ms |") == 3
    assert "Both answers agree: True." in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rows_prints_ratios_to_one_fused_call() -> None:
    rows = rows_of(run(benchmark("rows"), "--smoke"))
    assert rows["one fused forward"][1] == "1.00 (1.00 … 1.00)"
    for name in ("the forward again", "all rows", "64 rows", "32 rows"):
        assert float(rows[name][1].split()[0]) > 0


def test_pipeline_prints_a_line_a_shape() -> None:
    out = run(benchmark("pipeline"), "--smoke").splitlines()
    assert len(out) == 2 + 2
    for line in out[2:]:
        in_all, measured = re.search(r"training thread ([\d.]+) \(([\d.]+)\)", line).groups()  # type: ignore[union-attr]
        assert 0 < float(measured) < float(in_all)
        assert "TensorBoard" in line


def test_weights_prints_shares_of_a_step() -> None:
    assert run(benchmark("weights"), "--smoke").count("goal 0.5%") == 2


def test_kernel_is_checked_in_the_interpreter() -> None:
    assert run(benchmark("kernel"), "--smoke").count("interpreted, B1 H2/1 T150 D32 causal") == 2


def test_error_bars_prints_a_row_a_model() -> None:
    out = run(benchmark("error_bars"), "--smoke")
    assert {line.split(":")[0] for line in out.splitlines() if ": 12 " in line} >= {"GPT 256", "GPT 1024"}


def test_demo_seeds_prints_a_line_a_run() -> None:
    out = run(benchmark("demo_seeds"), "--seeds", "3", "--steps", "4")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["sound", "too-fast", "cured"]


@pytest.mark.xdist_group("demo")
def test_the_picture_of_the_readme(demo: object, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    folder = demo.folder  # type: ignore[attr-defined]
    run(benchmark("collapse_figure"), str(folder), "-o", str(out))
    assert out.read_bytes().startswith(b"\x89PNG")


def test_pages_prints_a_line_a_run() -> None:
    lines = run(benchmark("pages"), "--smoke").splitlines()
    assert lines[-1].split()[:4] == ["4", "heads", "×", "20"]
    assert len(lines[-1].split()) == 12

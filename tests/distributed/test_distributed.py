"""Distributed training is watched without a collective or a changed bit, and reads as one process would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import entropy_monitor as em
from entropy_monitor.hooks.sharding import Shard, first_of
from tests.distributed import scenarios
from tests.distributed.models import HEADS, Grouped, batches, decoder
from tests.distributed.pool import PROCESSES, Pool
from tests.distributed.wrapping import SPREADS

pytestmark = pytest.mark.xdist_group("distributed")

KEY = ["step", "layer", "layer_index", "call", "head", "attention", "rows_read"]
WEIGHTS = ["sigma_q", "sigma_k", "sigma_qk", "floor_weights", "floor_paper"]
UPDATES = ["grad_linf", "grad_l2", "update_sigma", "update_entropy"]
WHOLE = ["sigma_q", "sigma_k", "sigma_v", "sigma_o"]
# Where a process never has all that a figure needs. Each linear layer a unit of its own: its weight is freed
# before attention runs. Outputs gathered: no longer what a process's own weights made.
HEADS_UNKNOWN = {"fsdp2_linears": WEIGHTS, "tp_gathered": WEIGHTS}
LAYERS_UNKNOWN = {
    **{name: UPDATES for name in SPREADS if name != "ddp"},
    **{name: [*WHOLE, *UPDATES] for name in SPREADS if "tp" in name},
    "fsdp2_linears": ["sigma_q", "sigma_k", "sigma_v", *UPDATES],
    "tp_gathered": ["sigma_q", "sigma_k", "sigma_v", *UPDATES],
}


def alone(folder: Path, **options: Any) -> em.run.Run:
    """What one process measures of the same global batches."""
    torch.manual_seed(0)
    run_dir = folder / "alone"
    model = decoder(**options)
    scenarios.fit(model, 0, 1, str(run_dir))
    return em.load_run(run_dir)


def alone_in_bf16(folder: Path, processes: int = PROCESSES) -> em.run.Run:
    """What one process measures that computes just as the ranks together: bf16 copies of the weights."""
    model = decoder()
    optimizer = torch.optim.SGD(model.parameters(), scenarios.RATE, momentum=0.9)
    parts = [batches(part, processes) for part in range(processes)]
    with em.EntropyMonitor(model, run_dir=folder / "alone", every=1, rows="all") as monitor:
        for _ in range(scenarios.STEPS):
            losses = []
            for part in parts:
                x, y = next(part)
                low = {name: p.to(torch.bfloat16) for name, p in model.named_parameters()}
                out = torch.func.functional_call(model, low, (x.to(torch.bfloat16),))
                losses.append(F.cross_entropy(out.float(), y))
                (losses[-1] / processes).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(torch.stack(losses).mean())
    return em.load_run(folder / "alone")


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, em.run.Run]:
    folder = tmp_path_factory.mktemp("references")
    return {causal: alone(folder / str(causal), causal=causal) for causal in (True, False)}


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def counts(result: dict[str, Any]) -> list[int]:
    """Collectives of each group that ran some; groups made for one training have names of their own."""
    return sorted(n for n in result["collectives"].values() if n)


def assert_unchanged(off: list[dict[str, Any]], on: list[dict[str, Any]]) -> None:
    for without, watched in zip(off, on, strict=True):
        assert watched["faults"] == {}
        for name in ("losses", "gradients", "parameters", "buffers", "momenta", "random", "keys"):
            assert same(without[name], watched[name]), name
        assert counts(without) == counts(watched) != []


def assert_close(
    found: pd.DataFrame, expected: pd.DataFrame, keys: list[str], null: list[str], atol: float
) -> None:
    pd.testing.assert_frame_equal(found[keys], expected[keys])
    for column in expected.columns.difference(keys):
        if column in null:
            assert found[column].isna().all(), column
        else:
            a, b = found[column].to_numpy(float), expected[column].to_numpy(float)
            np.testing.assert_allclose(a, b, rtol=atol, atol=atol, err_msg=column)


@pytest.mark.parametrize("spread", SPREADS)
def test_every_way_to_spread_a_model(
    spread: str, pool: Pool, tmp_path: Path, references: dict[bool, em.run.Run]
) -> None:
    off = pool.run("train", spread, None)
    on = pool.run("train", spread, str(tmp_path / "run"))
    assert_unchanged(off, on)
    run, expected = em.load_run(tmp_path / "run"), references[spread != "tp_dtensors"]
    if spread == "fsdp2_bf16":
        expected = alone_in_bf16(tmp_path)
    atol = 1e-4
    assert run.problems == []
    assert_close(run.heads, expected.heads, KEY, HEADS_UNKNOWN.get(spread, []), atol)
    layer_keys = ["step", "layer", "layer_index"]
    assert_close(run.layers, expected.layers, layer_keys, LAYERS_UNKNOWN.get(spread, []), atol)
    assert_close(run.scalars, expected.scalars, ["step", "name"], [], atol)
    assert [session.ranks for session in run.sessions] == [tuple(range(PROCESSES))]
    assert all(session.closed for session in run.sessions)


@pytest.mark.parametrize(
    "spread",
    [
        "ddp_buckets",
        "fsdp2_bf16",
        *(
            pytest.param(n, marks=pytest.mark.full)
            for n in ("ddp", "fsdp2", "tp", "tp_dtensors", "tp_gathered")
        ),
    ],
)
def test_compiled_code_that_is_spread(
    spread: str, pair: Pool, tmp_path: Path, references: dict[bool, em.run.Run]
) -> None:
    off = pair.run("train", spread, None, backend="aot_eager")
    on = pair.run("train", spread, str(tmp_path / "run"), backend="aot_eager")
    assert_unchanged(off, on)
    run, expected = em.load_run(tmp_path / "run"), references[spread != "tp_dtensors"]
    if spread == "fsdp2_bf16":
        expected = alone_in_bf16(tmp_path, 2)
    assert {layer["mode"] for layer in run.plan.values()} == {"compiled"}
    assert run.problems == []
    name = spread.removesuffix("_buckets")
    assert_close(run.heads, expected.heads, KEY, HEADS_UNKNOWN.get(name, []), 1e-4)
    assert_close(
        run.layers, expected.layers, ["step", "layer", "layer_index"], LAYERS_UNKNOWN.get(name, []), 1e-4
    )


@pytest.mark.parametrize(
    ("options", "accumulate"),
    [({"find_unused_parameters": True}, 1), ({"static_graph": True}, 1), ({}, 3)],
    ids=["find_unused_parameters", "static_graph", "no_sync"],
)
def test_ddp_in_its_modes(options: dict[str, Any], accumulate: int, pool: Pool, tmp_path: Path) -> None:
    off = pool.run("train", "ddp", None, options=options, accumulate=accumulate)
    on = pool.run("train", "ddp", str(tmp_path / "run"), options=options, accumulate=accumulate)
    assert_unchanged(off, on)
    rows = em.load_run(tmp_path / "run").heads["rows_read"]
    assert (rows == accumulate * 64).all()


def test_the_comparison_sees_a_collective_and_a_changed_bit(pool: Pool, tmp_path: Path) -> None:
    off = pool.run("train", "ddp", None)
    on = pool.run("train", "ddp", str(tmp_path / "run"), careless=True)
    assert sum(counts(on[0])) == sum(counts(off[0])) + scenarios.STEPS
    on[2]["parameters"][0].view(-1)[0] += 1e-6
    assert not same(off[2]["parameters"], on[2]["parameters"])


def test_rows_are_sampled_alike(pool: Pool, tmp_path: Path) -> None:
    pool.run("train", "fsdp2_tp", str(tmp_path / "run"), rows=4)
    heads = em.load_run(tmp_path / "run").heads
    assert sorted(heads["head"].unique()) == list(range(HEADS))
    assert (heads["rows_read"] == 8 * 4).all()


def test_alerts_of_split_heads_are_kept_apart(pool: Pool, tmp_path: Path) -> None:
    pool.run("collapse", str(tmp_path / "run"), (0, 1, 6, 7))
    alerts = em.load_run(tmp_path / "run").alerts
    found = alerts[alerts["kind"] == "entropy_collapse"]
    layers = sorted(zip(found["layer"], map(tuple, found["heads"]), strict=True))
    assert layers == [(f"blocks.{i}.attn", heads) for i in range(2) for heads in ((0, 1), (6, 7))]
    assert not found.duplicated(["id", "opened"]).any()
    for _, alert in found.iterrows():
        assert alert["evidence"]["worst_head"] in alert["heads"]
        assert np.allclose(np.sum(alert["evidence"]["map"], axis=-1), 1, atol=1e-2)


def test_ranks_that_start_at_once_share_a_session(pool: Pool, tmp_path: Path) -> None:
    model = decoder()
    run_dir = tmp_path / "run"
    em.EntropyMonitor(model, run_dir=run_dir).close()  # one process, before
    assert pool.run("start", str(run_dir), 3) == [[1, 2, 3]] * PROCESSES
    assert pool.run("start", str(run_dir), 1) == [[4]] * PROCESSES
    assert pool.run("start", str(tmp_path / "fresh"), 2) == [[0, 1]] * PROCESSES
    assert [s.ranks for s in em.load_run(run_dir).sessions][1:] == [tuple(range(PROCESSES))] * 4


def test_one_rank_that_measures_while_others_fail(pool: Pool, tmp_path: Path) -> None:
    off = pool.run("train", "fsdp2", None)
    on = pool.run("train", "fsdp2", str(tmp_path / "run"), blind=True)
    assert on[0]["faults"] == {}
    assert all(result["faults"] for result in on[1:])
    for without, watched in zip(off, on, strict=True):
        assert same(without["parameters"], watched["parameters"])
        assert counts(without) == counts(watched)
    heads = em.load_run(tmp_path / "run").heads
    assert (heads["rows_read"] == 16).all()
    assert set(heads["step"]) == set(range(scenarios.STEPS))


@pytest.mark.parametrize(("processes", "heads", "key_heads"), [(2, 4, 1), (3, 6, 2), (3, 6, 1)])
def test_keys_that_are_too_few_to_be_split(
    processes: int, heads: int, key_heads: int, pool: Pool, tmp_path: Path
) -> None:
    results = pool.run("grouped", str(tmp_path / "run"), processes, heads, key_heads)
    assert results == ["read"] * processes + ["idle"] * (PROCESSES - processes)
    run = em.load_run(tmp_path / "run")
    scenarios.look(Grouped(heads, key_heads), str(tmp_path / "alone"))
    expected = em.load_run(tmp_path / "alone")
    assert run.problems == []
    assert_close(run.heads, expected.heads, KEY, [], 1e-4)
    assert run.layers["sigma_q"].isna().all()
    for weight in ("sigma_k", "sigma_v"):  # whole on each process, which may use some of its heads only
        known = run.layers[weight].dropna()
        np.testing.assert_allclose(known, expected.layers[weight][: len(known)], rtol=1e-4)


def test_other_weights_under_the_same_names_are_not_merged(
    pool: Pool, tmp_path: Path, references: dict[bool, em.run.Run]
) -> None:
    pool.run("by_hand", str(tmp_path / "run"))
    run = em.load_run(tmp_path / "run")
    (problem,) = run.problems
    assert "ranks 1, 3 hold other weights" in problem
    assert "blocks.0.attn, blocks.1.attn" in problem
    expected = references[True].heads
    first = expected[(expected["step"] == 0) & (expected["head"] < HEADS // 2)].reset_index(drop=True)
    assert_close(run.heads, first, KEY, [], 1e-4)  # of ranks 0 and 2, which hold copies


def test_heads_that_are_cut_are_not_numbered() -> None:
    weight = torch.zeros(10, 4)
    last = Shard((0,), (22, 0), (32, 4), (0, 1, 2))
    assert first_of(1, weight, last) is None
    assert first_of(2, torch.zeros(8, 4), Shard((0,), (24, 0), (32, 4), (0, 1, 2))) == 6


def test_a_killed_rank_leaves_a_readable_run(pair: Pool, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    results = pair.run("kill", str(run_dir), 1, 2)
    assert results == ["closed", None]
    run = em.load_run(run_dir)
    assert [session.ranks for session in run.sessions] == [(0, 1)]
    assert not run.sessions[0].closed
    heads = run.heads
    assert set(heads["step"]) == {0, 1, 2}
    assert heads["rows_read"].isin([32, 64]).all()  # the killed one's too, where they were on the disk


def test_what_was_flushed_is_read_when_all_ranks_are_killed(pair: Pool, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert pair.run("kill", str(run_dir), None, 3, 1) == [None] * 2
    run = em.load_run(run_dir)
    assert not run.sessions[0].closed
    heads = run.heads.set_index("step")
    assert {0, 1} <= set(heads.index) <= {0, 1, 2, 3}
    assert (heads.loc[[0, 1], "rows_read"] == 64).all()
    expected = alone(tmp_path).heads.set_index("step")
    np.testing.assert_allclose(heads.loc[[0, 1], "entropy"], expected.loc[[0, 1], "entropy"], rtol=1e-4)

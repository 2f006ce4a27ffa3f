"""σReparam in distributed training: what several processes train is what one process trains."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import entropy_monitor as em
from entropy_monitor.remedies.reparametrization.folding import scales_of
from tests.distributed.pool import Pool
from tests.remedies import distributed
from tests.remedies.distributed import Net, SplitNet, State, converted, plain

pytestmark = pytest.mark.xdist_group("distributed_remedies")

full = pytest.mark.full


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    yield from _pool(tmp_path_factory, 2)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    yield from _pool(tmp_path_factory, 4)


def _pool(tmp_path_factory: pytest.TempPathFactory, size: int) -> Iterator[Pool]:
    with mock.patch("tests.distributed.pool._serve", distributed.serve):
        pool = Pool(tmp_path_factory.mktemp("remedies") / "meeting", size)
        yield pool
        pool.close()


@functools.cache
def alone(kind: type[nn.Module] = Net, fused: str = "joint", accumulate: int = 1, forwards: int = 1) -> State:
    return distributed.fit(converted(kind, fused=fused), accumulate=accumulate, forwards=forwards)


def assert_same_training(found: list[State], expected: State, tolerance: float) -> None:
    for rank in found:
        assert rank.keys() == expected.keys()
        for name, value in rank.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)
            if name.endswith((".u", ".v")):
                assert torch.equal(value, found[0][name]), name


@pytest.mark.parametrize(
    ("spread", "options"),
    [
        ("ddp", {}),
        ("ddp", {"forwards": 2}),
        ("ddp", {"accumulate": 3}),
        ("ddp", {"recompute": True}),
        ("ddp", {"zero": True}),
        ("ddp_no_broadcast", {"forwards": 2}),
        ("ddp_static", {}),
        pytest.param("ddp_static", {"recompute": True}, marks=full),
        pytest.param("ddp_compiled", {}, marks=full),
    ],
)
def test_ddp(spread: str, options: dict[str, Any], pair: Pool) -> None:
    found = pair.run("train", spread, **options)
    how = {name: options[name] for name in ("accumulate", "forwards") if name in options}
    assert_same_training(found, alone(**how), 1e-12)


@pytest.mark.parametrize(
    ("spread", "options"),
    [
        ("fsdp2", {}),
        ("fsdp2", {"accumulate": 2, "forwards": 2}),
        ("fsdp2", {"recompute": True}),
        ("fsdp2_kept", {}),
        ("fsdp2_parts", {}),
        pytest.param("fsdp2_compiled", {}, marks=full),
        ("fsdp1", {"accumulate": 2}),
        pytest.param("fsdp1", {"recompute": True}, marks=full),
        ("fsdp1_flat", {}),
        pytest.param("fsdp1_no_shard", {}, marks=full),
        pytest.param("fsdp1_compiled", {}, marks=full),
    ],
)
def test_fsdp(spread: str, options: dict[str, Any], pair: Pool) -> None:
    found = pair.run("train", spread, **options)
    how = {name: options[name] for name in ("accumulate", "forwards") if name in options}
    fused = "each" if spread == "fsdp2_parts" else "joint"
    assert_same_training(found, alone(fused=fused, **how), 1e-10)


@pytest.mark.parametrize("spread", ["tp", pytest.param("tp_compiled", marks=full)])
def test_tensor_parallel(spread: str, pair: Pool) -> None:
    assert_same_training(pair.run("train", spread), alone(SplitNet), 1e-10)


@full
@pytest.mark.parametrize(("spread", "kind"), [("fsdp2_tp", SplitNet), ("hsdp", Net)])
def test_two_dimensions(spread: str, kind: type[nn.Module], four: Pool) -> None:
    assert_same_training(four.run("train", spread), alone(kind), 1e-10)


def test_vectors_follow_the_weights_that_bf16_is_made_from(pair: Pool) -> None:
    for rank in pair.run("mixed_precision"):
        stems = [name.removesuffix("0.u") for name in rank if name.endswith(".0.u")]
        assert len(stems) == 11
        for stem in stems:
            w, u, v = (rank[stem + name] for name in ("original", "0.u", "0.v"))
            assert {w.dtype, u.dtype, v.dtype, rank[stem + "0.gamma"].dtype} == {torch.float32}
            exact = torch.linalg.matrix_norm(w.flatten(1), 2)
            torch.testing.assert_close(u @ w.flatten(1) @ v, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("spread", ["fsdp2", "tp"])
def test_two_messages_do_for_all_weights(spread: str, pair: Pool) -> None:
    model = plain(SplitNet if spread == "tp" else Net)
    split = [w for name, w in model.named_parameters() if w.dim() > 1 and (spread == "fsdp2" or "bl" in name)]
    rows, columns = sum(len(w) for w in split), sum(w[0].numel() for w in split)
    for sent in pair.run("messages", spread):
        assert sent == [rows, columns]


def test_models_of_one_process_disturb_nothing(pair: Pool) -> None:
    assert_same_training(pair.run("beside_other_models"), alone(), 1e-10)


def test_state_dicts(pair: Pool) -> None:
    for rank in pair.run("state_dicts"):
        assert rank["trained"].keys() == rank["again"].keys() == rank["full"].keys()
        for name, value in rank["trained"].items():
            assert torch.equal(value, rank["again"][name])
            assert torch.equal(value, rank["full"][name])
        whole = plain()
        whole.load_state_dict(em.fold_state_dict(rank["full"]))
        x, _ = next(distributed.batches(0, 1))
        for out in (whole(x), rank["folded"], rank["taken"]):
            torch.testing.assert_close(out, rank["out"], rtol=1e-12, atol=1e-14)


def test_what_is_wrapped_is_refused(pair: Pool) -> None:
    for said in pair.run("refusals"):
        assert "DistributedDataParallel" in said["convert ddp"]
        assert "FSDPModule" in said["convert fsdp2"]
        assert "FullyShardedDataParallel" in said["convert fsdp1"]
        assert all("first, then wrap" in said[f"convert {way}"] for way in ("ddp", "fsdp2", "fsdp1"))
        assert all("is sharded by FSDP" in said[f"fold {way}"] for way in ("fsdp2", "fsdp2 inside", "fsdp1"))
        assert "patch.weight" in said["fold fsdp2"]
        assert "em.fold_state_dict" in said["fold fsdp1"]


def test_meta_weights_are_refused_by_name() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(em.ConfigurationError, match=r"patch.weight is on the meta device.*to_empty"):
        em.sigma_reparam(model, gamma="one")


def test_conversion_of_split_layers(pair: Pool) -> None:
    expected = plain(SplitNet)(next(distributed.batches(0, 1))[0])
    for rank in pair.run("tensor_parallel"):
        for out in rank["outputs"]:
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
        assert rank["layouts"] == {(Tensor, "(Replicate(),)")}
        assert rank["sent"] == [(1, 1), (1, 1)]  # a number each way, by rows or by columns
        assert rank["keys"] == list(plain(SplitNet).state_dict())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_is_folded_without_a_trace_on_the_model(use_buffers: bool) -> None:
    model = converted(dtype=torch.float32)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=use_buffers).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    data = distributed.batches(0, 1, torch.float32)
    for _ in range(10):
        x, y = next(data)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    out = average(x)
    for _, scale in scales_of(average.module):
        weight = scale.holder().detach().flatten(1)
        torch.testing.assert_close(torch.linalg.matrix_norm(weight, 2), scale.gamma[0], rtol=1e-6, atol=0)
    folded = em.fold(copy.deepcopy(average.module))
    assert list(folded.state_dict()) == list(plain().state_dict())
    torch.testing.assert_close(folded(x), out, rtol=1e-6, atol=1e-6)
    restored = converted(dtype=torch.float32)
    restored.load_state_dict(average.module.state_dict())
    torch.testing.assert_close(restored(x), out, rtol=1e-6, atol=1e-6)
    assert torch.equal(average(x), out)  # though layers and their copies are of one class

"""What the processes of the distributed tests of σReparam run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import entropy_monitor as em
from entropy_monitor.remedies.reparametrization.folding import scales_of
from entropy_monitor.remedies.reparametrization.spectral import whole
from tests.distributed import pool

WIDTH, HEADS, TOKENS, CLASSES, BATCH, STEPS = 15, 3, 6, 5, 8, 10
FULL = StateDictOptions(full_state_dict=True)

State = dict[str, Tensor]
Spread = tuple[nn.Module, int, int]  # a model, which part of the data is this process's, and of how many


class Block(nn.Module):
    """Attention and a feed-forward net whose sizes two processes cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        # A bias of keys has no gradient but rounding, which Adam takes for one.
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """With a kernel, and a gate of one row, of which the second process holds nothing."""

    recompute = False

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv1d(3, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.gate, self.head = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).transpose(1, 2)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head((x * self.gate(x).sigmoid()).mean(1))


class SplitBlock(nn.Module):
    """A block for tensor parallel: any number of heads is here."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=name != "k") for name in "qkvo")
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 2)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class SplitNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Linear(3, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(SplitBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x.transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def plain(kind: type[nn.Module] = Net, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same model at every call."""
    torch.manual_seed(0)
    return kind().to(dtype)


def converted(kind: type[nn.Module] = Net, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    return em.sigma_reparam(plain(kind, dtype), gamma="one", **options)


def batches(part: int, parts: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless global batches, of which every process takes its part."""
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(BATCH, 3, TOKENS, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        yield x.chunk(parts)[part], y.chunk(parts)[part]


def state(model: nn.Module) -> State:
    """All that a model holds, gathered, by clean names."""
    summon: Any = FullyShardedDataParallel.summon_full_params
    flat = isinstance(model, FullyShardedDataParallel)
    with summon(model) if flat else contextlib.nullcontext():
        found = {name: whole(value).detach().clone() for name, value in model.state_dict().items()}
    for extra in ("module.", "_orig_mod.", "_fsdp_wrapped_module."):
        found = {name.replace(extra, ""): value for name, value in found.items()}
    return found


def fit(
    model: nn.Module,
    part: int = 0,
    parts: int = 1,
    *,
    accumulate: int = 1,
    forwards: int = 1,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> State:
    """Train; what the model holds then."""
    optimizer = make(model.parameters(), lr=1e-2, weight_decay=0.1)
    data = batches(part, parts, dtype)
    for _ in range(steps):
        for micro in range(accumulate):
            x, y = next(data)
            waits = micro + 1 < accumulate and hasattr(model, "no_sync")
            with model.no_sync() if waits else contextlib.nullcontext():
                sum(F.cross_entropy(model(x.roll(n, -1)), y) for n in range(forwards)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(model, FullyShardedDataParallel):
        model(next(data)[0])  # whose u and v follow only now
    return state(model)


def _data_parallel(model: nn.Module) -> Spread:
    return model, dist.get_rank(), dist.get_world_size()


def ddp(model: nn.Module, **options: Any) -> Spread:
    return _data_parallel(DistributedDataParallel(model, **options))


def ddp_compiled(model: nn.Module) -> Spread:
    return _data_parallel(torch.compile(DistributedDataParallel(model), backend="aot_eager"))


def fsdp2(model: nn.Module, **options: Any) -> Spread:
    for block in model.blocks:
        fully_shard(block, **options)
    return _data_parallel(fully_shard(model, **options))


def fsdp1(model: nn.Module, **options: Any) -> Spread:
    options = {"use_orig_params": True, "auto_wrap_policy": ModuleWrapPolicy((Block,))} | options
    return _data_parallel(FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options))


def fsdp1_no_shard(model: nn.Module) -> Spread:
    return fsdp1(model, sharding_strategy=ShardingStrategy.NO_SHARD, auto_wrap_policy=None)


def block_compiled(model: nn.Module, spread: Callable[..., Spread]) -> Spread:
    model.blocks[0].compile(backend="aot_eager")
    return spread(model)


def split(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Tensor parallel: to be converted afterwards."""
    columns = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
    for block in model.blocks:
        plan = {**columns, "o": RowwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh or init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    return model


def tp(compiled: bool = False) -> Spread:
    model = em.sigma_reparam(split(plain(SplitNet)), gamma="one")
    return (torch.compile(model, backend="aot_eager") if compiled else model), 0, 1


def _grid() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def fsdp2_tp() -> Spread:
    mesh = _grid()
    model = em.sigma_reparam(split(plain(SplitNet), mesh["tp"]), gamma="one")
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]), mesh.get_local_rank("dp"), 2


SPREADS: dict[str, Callable[[], Spread]] = {
    "ddp": lambda: ddp(converted()),
    "ddp_no_broadcast": lambda: ddp(converted(), broadcast_buffers=False),
    "ddp_static": lambda: ddp(converted(), static_graph=True),
    "ddp_compiled": lambda: ddp_compiled(converted()),
    "fsdp2": lambda: fsdp2(converted()),
    "fsdp2_kept": lambda: fsdp2(converted(), reshard_after_forward=False),
    "fsdp2_parts": lambda: fsdp2(converted(fused="each")),
    "fsdp2_compiled": lambda: block_compiled(converted(), fsdp2),
    "fsdp1": lambda: fsdp1(converted()),
    "fsdp1_flat": lambda: fsdp1(converted(), use_orig_params=False),
    "fsdp1_no_shard": lambda: fsdp1_no_shard(converted()),
    "fsdp1_compiled": lambda: block_compiled(converted(), fsdp1),
    "tp": tp,
    "tp_compiled": lambda: tp(compiled=True),
    "fsdp2_tp": fsdp2_tp,
    "hsdp": lambda: fsdp2(converted(), mesh=_grid()),
}


def train(spread: str, *, recompute: bool = False, zero: bool = False, **options: Any) -> State:
    torch._dynamo.reset()
    with mock.patch.object(Net, "recompute", recompute):
        if zero:
            options["make"] = lambda parameters, **rest: ZeroRedundancyOptimizer(
                parameters, torch.optim.AdamW, **rest
            )
        return fit(*SPREADS[spread](), **options)


def mixed_precision() -> State:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, part, parts = fsdp2(converted(dtype=torch.float32), mp_policy=policy)
    return fit(model, part, parts, dtype=torch.float32)


def messages(spread: str) -> list[int]:
    """How long each vector is that the processes sum in a step of the optimizer."""
    model, part, parts = SPREADS[spread]()
    sent: list[int] = []
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = next(batches(part, parts))
    F.cross_entropy(model(x), y).backward()
    send = dist.all_reduce

    def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(len(tensor))
        return send(tensor, *args, **kwargs)

    with mock.patch("torch.distributed.all_reduce", count):
        optimizer.step()
    return sent


def beside_other_models() -> State:
    """Processes that have converted models of their own, made before and after, in steps in between."""
    rank = dist.get_rank()
    own = [converted() for _ in range(rank)]
    model, part, parts = SPREADS["fsdp2"]()
    own += [em.sigma_reparam(nn.Linear(4, 4), gamma="one") for _ in range(2 - rank)]
    for other in own:
        if isinstance(other, Net):
            fit(other, steps=2)
    return fit(model, part, parts)


def state_dicts() -> dict[str, Any]:
    """Out of and into sharded models."""
    model, part, parts = SPREADS["fsdp2"]()
    trained = fit(model, part, parts)
    full = get_model_state_dict(model, options=FULL)
    again, *_ = SPREADS["fsdp2"]()
    set_model_state_dict(again, dict(full), options=FULL)  # it writes into the dict
    folded, *_ = fsdp2(plain())
    folded.load_state_dict(em.fold_state_dict(model.state_dict()))
    taken, *_ = SPREADS["fsdp2"]()
    taken.load_state_dict(folded.state_dict())
    x, _ = next(batches(0, 1))
    return {
        "trained": trained,
        "full": full,
        "again": state(again),
        "out": model(x).detach(),
        "folded": folded(x).detach(),
        "taken": taken(x).detach(),
    }


def refusals() -> dict[str, str]:
    """What is said where something is wrapped already."""
    sharded = SPREADS["fsdp2"]()[0]
    tries: dict[str, Callable[[], object]] = {
        "convert ddp": lambda: em.sigma_reparam(ddp(plain())[0], gamma="one"),
        "convert fsdp2": lambda: em.sigma_reparam(fsdp2(plain())[0], gamma="one"),
        "convert fsdp1": lambda: em.sigma_reparam(fsdp1(plain())[0], gamma="one"),
        "fold fsdp2": lambda: em.fold(sharded),
        "fold fsdp2 inside": lambda: em.fold(sharded.blocks[0].attn),
        "fold fsdp1": lambda: em.fold(SPREADS["fsdp1"]()[0]),
    }
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except em.ConfigurationError as error:
            said[name] = str(error)
    fit(sharded, dist.get_rank(), dist.get_world_size(), steps=1)  # it is what it was
    return said


def tensor_parallel() -> dict[str, Any]:
    """Conversion of a model that is split, and back; what its layers send."""
    model = split(plain(SplitNet))
    x, _ = next(batches(0, 1))
    outputs = [model(x).detach()]
    em.sigma_reparam(model, gamma="preserve")
    outputs.append(model(x).detach())
    layouts = {(type(s.u), str(s.gamma.placements)) for name, s in scales_of(model) if "blocks" in name}
    sent = []
    for layer in (model.blocks[0].q, model.blocks[0].down):
        with CommDebugMode() as forward:
            weight = layer.weight
        with CommDebugMode() as backward:
            weight.sum().backward()
        sent.append((forward.get_total_counts(), backward.get_total_counts()))
    em.fold(model)
    outputs.append(model(x).detach())
    return {"outputs": outputs, "layouts": layouts, "sent": sent, "keys": list(model.state_dict())}


def serve(*args: Any) -> None:
    """As the processes of `tests.distributed` do, but the functions here."""
    with mock.patch("tests.distributed.scenarios", sys.modules[__name__], create=True):
        pool._serve(*args)

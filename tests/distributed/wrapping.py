"""Ways to spread a model over four processes: each gives what is trained, the data part, and of how many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.models import Attention, Block, decoder

Spread = tuple[nn.Module, int, int]


def _whole(model: nn.Module) -> Spread:
    return model, dist.get_rank(), dist.get_world_size()


def ddp(model: nn.Module, **options: Any) -> Spread:
    return _whole(DistributedDataParallel(model, **options))


def fsdp2(model: nn.Module, policy: MixedPrecisionPolicy | None = None, linears: bool = False) -> Spread:
    policy = policy or MixedPrecisionPolicy()
    for block in model.blocks:
        if linears:
            for linear in (block.attn.q, block.attn.k, block.attn.v, block.attn.o):
                fully_shard(linear, mp_policy=policy)
        fully_shard(block, mp_policy=policy)
    return _whole(fully_shard(model, mp_policy=policy))


def fsdp2_bf16(model: nn.Module) -> Spread:
    return fsdp2(model, MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def fsdp2_linears(model: nn.Module) -> Spread:
    return fsdp2(model, linears=True)


def fsdp1(model: nn.Module, originals: bool = True, units: tuple[type[nn.Module], ...] = (Block,)) -> Spread:
    return _whole(
        FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy(units),
            use_orig_params=originals,
            device_id=torch.device("cpu"),
        )
    )


def fsdp1_flat(model: nn.Module) -> Spread:
    return fsdp1(model, False)


def fsdp1_attention(model: nn.Module) -> Spread:
    return fsdp1(model, True, (Attention,))


def fsdp1_no_shard(model: nn.Module) -> Spread:
    return _whole(
        FullyShardedDataParallel(
            model,
            sharding_strategy=ShardingStrategy.NO_SHARD,
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    )


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh, local: bool = True) -> None:
    out = {"use_local_output": local}
    plan: dict[str, Any] = {
        "attn.q": ColwiseParallel(**out),
        "attn.k": ColwiseParallel(**out),
        "attn.v": ColwiseParallel(**out),
        "attn.o": RowwiseParallel(),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
    }
    for block in model.blocks:
        parallelize_module(block, mesh, plan)


def tp(model: nn.Module) -> Spread:
    _tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, 0, 1


def tp_dtensors(model: nn.Module) -> Spread:
    """Attention itself runs on DTensors; on CPU torch splits only the plain SDPA, without a causal mask."""
    forward = model.forward

    def plainly(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return forward(x)

    model.forward = plainly
    _tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)), local=False)
    return model, 0, 1


def tp_sequence(model: nn.Module) -> Spread:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, Any] = {
        "norm": SequenceParallel(),
        "norm2": SequenceParallel(),
        "attn": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "attn.q": ColwiseParallel(),
        "attn.k": ColwiseParallel(),
        "attn.v": ColwiseParallel(),
        "attn.o": RowwiseParallel(output_layouts=Shard(1)),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    split = PrepareModuleInput(
        input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True
    )
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    model.blocks[0] = parallelize_module(model.blocks[0], mesh, split)
    gather = PrepareModuleInput(
        input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
    )
    model.norm = parallelize_module(model.norm, mesh, gather)
    return model, 0, 1


def tp_gathered(model: nn.Module) -> Spread:
    """Projections split, their outputs gathered: every process attends with all heads."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        parallelize_module(
            block,
            mesh,
            {
                **{f"attn.{n}": ColwiseParallel(output_layouts=Replicate()) for n in "qkv"},
                "up": ColwiseParallel(),
                "down": RowwiseParallel(),
            },
        )
    return model, 0, 1


def _grid() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def fsdp2_tp(model: nn.Module) -> Spread:
    mesh = _grid()
    _tensor_parallel(model, mesh["tp"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]), mesh.get_local_rank("dp"), 2


def ddp_tp(model: nn.Module) -> Spread:
    mesh = _grid()
    _tensor_parallel(model, mesh["tp"])
    _pre_dp_module_transform(model)
    wrapped = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    return wrapped, mesh.get_local_rank("dp"), 2


def compiled(name: str, backend: str) -> Spread:
    """A decoder that is spread and compiled: as a whole where DDP sends gradients, else block by block."""
    model = decoder(causal=name != "tp_dtensors")
    if not name.startswith("ddp"):
        for block in model.blocks:
            block.compile(backend=backend)
        return SPREADS[name](model)
    # In small buckets, DDP has the compiled graph cut where a bucket is full.
    torch._dynamo.config.optimize_ddp = True
    dist._DEFAULT_FIRST_BUCKET_BYTES = 4096 if name == "ddp_buckets" else 1 << 20
    wrapped, part, parts = ddp(model, **({"bucket_cap_mb": 0.005} if name == "ddp_buckets" else {}))
    return torch.compile(wrapped, backend=backend), part, parts


class _Sum(nn.Module):
    """A linear layer of which each process of a group has some inputs."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.linear, self.group = linear, group

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor = self.linear.bias
        out = torch.nn.functional.linear(x, self.linear.weight)
        return all_reduce(out, group=self.group) + bias


def split_by_hand(model: nn.Module, part: int, parts: int, group: dist.ProcessGroup) -> None:
    """Give a decoder's attention plain tensors that hold some of its heads, as Megatron does."""
    for block in model.blocks:
        attn = block.attn
        for name in "qkv":
            setattr(attn, name, _rows(getattr(attn, name), part, parts))
        columns = nn.Linear(attn.o.in_features // parts, attn.o.out_features)
        columns.weight = nn.Parameter(attn.o.weight.detach().chunk(parts, 1)[part].contiguous())
        columns.bias = attn.o.bias
        attn.o = _Sum(columns, group)


def _rows(linear: nn.Linear, part: int, parts: int) -> nn.Linear:
    held = nn.Linear(linear.in_features, linear.out_features // parts, bias=linear.bias is not None)
    held.weight = nn.Parameter(linear.weight.detach().chunk(parts)[part].contiguous())
    if linear.bias is not None:
        held.bias = nn.Parameter(linear.bias.detach().chunk(parts)[part].contiguous())
    return held


SPREADS: dict[str, Callable[[nn.Module], Spread]] = {
    f.__name__: f
    for f in (
        ddp,
        fsdp2,
        fsdp2_bf16,
        fsdp2_linears,
        fsdp1,
        fsdp1_flat,
        fsdp1_attention,
        fsdp1_no_shard,
        tp,
        tp_dtensors,
        tp_sequence,
        tp_gathered,
        fsdp2_tp,
        ddp_tp,
    )
}

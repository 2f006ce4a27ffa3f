"""What the processes of the pool run."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from entropy_monitor import EntropyMonitor
from tests.distributed.models import HEAD, HEADS, WIDTH, Grouped, batches, decoder
from tests.distributed.wrapping import SPREADS, compiled, ddp, split_by_hand

STEPS = 3
RATE = 0.05


def local(tensor: Tensor) -> Tensor:
    """What this process holds, as a copy."""
    held = getattr(tensor, "_local_tensor", tensor)
    return held.detach().clone()


def collectives() -> dict[str, int]:
    """How many collectives each group of processes ran."""
    if not dist.is_initialized():
        return {}
    groups = dist.distributed_c10d._world.pg_names
    return {name: group._get_sequence_number_for_group() for group, name in groups.items()}


def train(
    spread: str,
    run_dir: str | None,
    *,
    accumulate: int = 1,
    options: dict[str, Any] | None = None,
    backend: str = "",
    **watch: Any,
) -> dict[str, Any]:
    """Train for some steps; all that the training leaves on this process."""
    if backend:
        torch._dynamo.reset()  # what was compiled for a training before
        model, part, parts = compiled(spread, backend)
    elif options is None:
        model, part, parts = SPREADS[spread](decoder(causal=spread != "tp_dtensors"))
    else:
        model, part, parts = ddp(decoder(idle="find_unused_parameters" in options), **options)
    return fit(model, part, parts, run_dir, accumulate=accumulate, **watch)


def fit(
    model: nn.Module,
    part: int,
    parts: int,
    run_dir: str | None,
    *,
    accumulate: int = 1,
    steps: int = STEPS,
    die: tuple[int | None, int] | None = None,
    flush: int | None = None,
    blind: bool = False,
    careless: bool = False,
    **watch: Any,
) -> dict[str, Any]:
    """See `train`.

    Args:
        model: what is trained.
        part: which part of every batch is this process's.
        parts: of how many.
        run_dir: where it is watched; None for not at all.
        accumulate: batches a step.
        steps: how many.
        die: the rank that is killed, or all for None, and after which step; nothing is flushed before.
        flush: after which step all that was measured is flushed.
        blind: let the reading of every rank but 0 fail.
        careless: run a collective of the test's own in every step.
        watch: options of the monitor.
    """
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    monitor = None
    if run_dir is not None:
        watch = {"every": 1, "rows": "all", **watch}
        monitor = EntropyMonitor(model, optimizer=optimizer, run_dir=run_dir, **watch)
        if blind and dist.get_rank():
            monitor._recorder.attention = None  # type: ignore[method-assign,assignment]  what calls it fails
            monitor._confirmed = True  # else it would say so, and raise, in the first step
    torch.manual_seed(3)
    data, losses, gradients = batches(part, parts), [], []
    before = collectives()
    for step in range(steps):
        for micro in range(accumulate):
            x, y = next(data)
            waits = micro + 1 < accumulate and hasattr(model, "no_sync")
            with model.no_sync() if waits else torch.enable_grad():
                loss = F.cross_entropy(model(x).float(), y)
                loss.backward()
        optimizer.step()
        gradients += [local(p.grad) for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(loss)
        losses.append(loss.item())
        if careless:
            dist.all_reduce(torch.zeros(1))
        if flush == step:
            _flush(monitor)
        if die is not None and die[0] in (None, dist.get_rank()) and die[1] == step:
            os.kill(os.getpid(), signal.SIGKILL)
    after = collectives()
    faults: dict[str, int] = {}
    if monitor is not None:
        monitor.close()
        faults = {**monitor.faults, **monitor.dropped}
    return {
        "losses": losses,
        "gradients": gradients,
        "parameters": [local(p) for p in model.parameters()],
        "buffers": [local(b) for b in model.buffers()],
        "momenta": [local(s["momentum_buffer"]) for s in optimizer.state.values()],
        "random": torch.get_rng_state(),
        "keys": list(model.state_dict()) if not hasattr(model, "_fsdp_wrapped_module") else [],
        "collectives": {name: n - before.get(name, 0) for name, n in after.items()},
        "faults": faults,
    }


def _flush(monitor: EntropyMonitor | None) -> None:
    """Wait until what was measured so far is on the disk."""
    assert monitor is not None
    flushed = threading.Event()
    monitor._pipeline.receive()
    monitor._delivery.call(monitor._store, monitor._store.flush)
    monitor._delivery.call(monitor._store, flushed.set)
    assert flushed.wait(30)


def kill(run_dir: str, rank: int | None, step: int, flush: int | None = None) -> str:
    """Train until one process is killed, or all; how the others end."""
    model, part, parts = ddp(decoder())
    # A further step would wait for it.
    fit(model, part, parts, run_dir, steps=step + 1, die=(rank, step), flush=flush)
    return "closed"


def grouped(run_dir: str, processes: int, heads: int, key_heads: int) -> str:
    """Query heads split over some of the processes, each with all keys: there are too few to split them."""
    mesh = DeviceMesh("cpu", torch.arange(processes))
    if dist.get_rank() >= processes:
        return "idle"
    model = Grouped(heads, key_heads)
    model.first = dist.get_rank() * heads // processes
    parallelize_module(model, mesh, {"q": ColwiseParallel()})
    return look(model, run_dir)


def by_hand(run_dir: str) -> str:
    """Tensor parallel with plain tensors, two processes to each of two copies."""
    pair = dist.get_rank() // 2
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = decoder()
    split_by_hand(model, dist.get_rank() % 2, 2, groups[pair])
    return look(model, run_dir, pair, 2)


def look(model: nn.Module, run_dir: str, part: int = 0, parts: int = 1) -> str:
    """Measure one step without training."""
    x, _ = next(batches(part, parts))
    with EntropyMonitor(model, run_dir=run_dir, every=1, rows="all") as monitor:
        model(x).sum().backward()
        monitor.step()
    assert monitor.faults == {}
    return "read"


def collapse(run_dir: str, collapsing: tuple[int, ...]) -> tuple[int, ...]:
    """Tensor parallel, with some heads that collapse after some steps."""
    model, _, _ = SPREADS["tp"](decoder(causal=False))
    monitor = EntropyMonitor(model, run_dir=run_dir, every=1)
    first = dist.get_rank() * HEADS // dist.get_world_size()
    x, y = next(batches())
    weights = [local(block.attn.q.weight) for block in model.blocks]
    for step in range(10):
        for block, weight in zip(model.blocks, weights, strict=True):
            rows = [h for h in range(len(weight) // HEAD) if first + h in collapsing and step >= 6]
            factors = torch.full((len(weight) // HEAD, 1, 1), 0.01)
            factors[rows] = 1e4
            held = block.attn.q.weight._local_tensor
            held.detach().copy_((weight.view(-1, HEAD, WIDTH) * factors).view(weight.shape))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        monitor.step(loss)
    monitor.close()
    assert monitor.faults == {}
    return tuple(range(first, first + len(weights[0]) // HEAD))


def start(run_dir: str, times: int = 1) -> list[int]:
    """Begin and end runs in a directory, all processes at once; the sessions that this process got."""
    sessions = []
    for _ in range(times):
        monitor = EntropyMonitor(decoder(), run_dir=run_dir)
        session = monitor._store.session
        assert session is not None
        sessions.append(session)
        monitor.close()
    return sessions

"""The processes of a distributed training, and which of them this is."""

from __future__ import annotations

import uuid
from collections import Counter
from pathlib import Path

import torch

_starts: Counter[Path] = Counter()  # how many runs this process began in each directory


def is_distributed() -> bool:
    """Whether this is one of several processes of a training."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def rank() -> int:
    """Of this process, 0 where there is only one."""
    return torch.distributed.get_rank() if is_distributed() else 0


def launch(run_dir: Path) -> str:
    """What tells this launch, and its nth run in this directory, from others; empty for one process.

    Whichever rank comes first names the launch in the store that all ranks have met in: nobody is waited for.
    """
    if not is_distributed():
        return ""
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        name = store.compare_set("entropy_monitor/launch", "", uuid.uuid4().hex).decode()
    except (RuntimeError, AttributeError):  # a store of another kind: what the environment says has to do
        return ""
    place = run_dir.resolve()
    _starts[place] += 1
    return f"{name}-{_starts[place]}"

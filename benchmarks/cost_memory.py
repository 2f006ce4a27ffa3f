"""The most memory that a contender's training takes, in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from cost_contenders import CONTENDERS, why
from cost_plain import Setting

_MB = 2**20
_STATUS = Path("/proc/self/status")


def peaks(setting: Setting, threads: int) -> dict[str, float | str]:
    """Peak memory in MB of two measured steps of each contender; text that says why where there is no figure.

    On the CPU the high-water mark of the process's resident memory, on CUDA that of torch's allocator.
    """
    # Forked from a process that has imported everything and computed nothing: all start from the same memory.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as origin:
        return origin.submit(_fork_all, setting, threads).result()


def _fork_all(setting: Setting, threads: int) -> dict[str, float | str]:
    found = {}
    for name in CONTENDERS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as child:
            found[name] = child.submit(_peak, name, setting, threads).result()
    return found


def _peak(name: str, setting: Setting, threads: int) -> float | str:
    torch.set_num_threads(threads)
    try:
        contender = CONTENDERS[name](setting)
        for _ in range(2):
            contender.measured()
            contender.between()
        contender.close()
    except Exception as error:  # noqa: BLE001  a contender may fail in any way
        return why(error)
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated() / _MB
    if not _STATUS.exists():
        return "no /proc here"
    # Not ru_maxrss, which a process inherits from the one that started it.
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024

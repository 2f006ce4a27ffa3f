"""Processes that run one function of `scenarios` after another, so that torch is started only once."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

PROCESSES = 4
_LIMIT = 60.0  # seconds for one function: to end a test that hangs, not to time one that runs


class Pool:
    """Processes of one gloo group.

    Args:
        meeting: a path that does not exist, in which they find each other.
        size: how many processes.
    """

    def __init__(self, meeting: Path, size: int = PROCESSES) -> None:
        self._meeting = meeting
        self._size = size
        self._starts = 0
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []

    def run(self, function: str, *args: Any, **kwargs: Any) -> list[Any]:
        """What `scenarios.function` gives on each process, by rank; None where one was killed.

        Raises:
            RuntimeError: it raised on one of them, with the traceback; or it hangs.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        end = time.monotonic() + _LIMIT
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            fine, result = _answer(pipe, end)
            results.append(result)
            if not fine:
                errors.append(f"{function} on rank {rank}: {result}")
        if errors or None in results:
            self.close()  # who is left may wait for the others; the next run starts anew
        if errors:
            raise RuntimeError("\n".join(errors))
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        self._starts += 1
        context = multiprocessing.get_context("spawn")
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            for rank in range(self._size):
                ours, theirs = context.Pipe()
                args = (rank, self._size, f"{self._meeting}-{self._starts}", theirs)
                process = context.Process(target=_serve, args=args, daemon=True)
                process.start()
                theirs.close()  # so that the end of the process is the end of the pipe
                self._pipes.append(ours)
                self._processes.append(process)


def _answer(pipe: Connection, end: float) -> tuple[bool, Any]:
    try:
        if not pipe.poll(max(0.0, end - time.monotonic())):
            return False, "does not end"
        fine, result = pipe.recv()
    except EOFError:
        return True, None
    return fine, result


def _serve(rank: int, size: int, meeting: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from tests.distributed import scenarios

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    while True:
        function, args, kwargs = pipe.recv()
        try:
            pipe.send((True, getattr(scenarios, function)(*args, **kwargs)))
        except Exception:  # noqa: BLE001  the parent raises it
            pipe.send((False, traceback.format_exc()))

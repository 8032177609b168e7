"""A few real processes that talk over gloo, kept for a whole test module; for functions of one rank.

Starting a process costs seconds (importing torch), so a pool runs many functions. Anything that goes wrong, a
hang included, ends the pool's processes; the next call starts new ones.
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

COLLECTIVE_SECONDS = 20
CALL_SECONDS = 45


class Ranks:
    """``world_size`` processes with an initialised default process group; use as a context."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, *args)`` on every rank; what they return, by rank; numbers and lists, no tensors."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        deadline = time.monotonic() + CALL_SECONDS
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"no answer within {CALL_SECONDS} s")
                succeeded, value = pipe.recv()
            except (EOFError, TimeoutError) as error:
                succeeded, value = False, repr(error)
            results.append(value)
            if not succeeded:
                errors.append(f"rank {rank}: {value}")
        if errors:
            self.stop()
            raise AssertionError("\n".join(errors))
        return results

    def stop(self) -> None:
        """End the processes; they hold nothing worth keeping."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join(10)
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the tests have ended, in whatever way
            return
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))

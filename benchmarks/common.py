"""What the benchmarks share: ranks on this machine, interleaved timing, Markdown. Nothing about training."""

from __future__ import annotations

import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["Timing", "interleaved", "print_table", "run_ranks"]


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, threads: int = 1) -> list[Any]:
    """Call ``function(rank, world_size, *arguments)`` in processes joined by gloo; return each rank's result.

    Args:
        world_size: how many processes.
        function: importable by name, as the processes are spawned.
        arguments: picklable.
        threads: of each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_be_rank, (world_size, function, arguments, threads, folder), nprocs=world_size)
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(world_size)]


def _be_rank(
    rank: int, world_size: int, function: Callable[..., Any], arguments: Sequence[Any], threads: int, folder: str
) -> None:
    torch.set_num_threads(threads)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    _result(folder, rank).write_bytes(pickle.dumps(function(rank, world_size, *arguments)))
    dist.barrier()
    dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}"


@dataclass(frozen=True)
class Timing:
    """Medians over rounds."""

    seconds: float
    ratio: float
    """To the reference, of the same round's seconds."""
    cpu_ratio: float
    """The same of this process' CPU time, which does not see who else uses the machine, nor waits."""


def interleaved(contestants: Mapping[str, Callable[[], object]], reference: str, rounds: int) -> dict[str, Timing]:
    """Time all contestants in each round, after one round that is not counted.

    Their order rotates, so that a slow moment of the machine meets all of them.
    """
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    names = list(contestants)
    for index in range(rounds + 1):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter(), time.process_time()
            contestants[name]()
            if index:
                measured[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))

    def ratio(name: str, clock: int) -> float:
        pairs = zip(measured[name], measured[reference], strict=True)
        return statistics.median(own[clock] / base[clock] for own, base in pairs)

    return {
        name: Timing(statistics.median(wall for wall, _ in values), ratio(name, 0), ratio(name, 1))
        for name, values in measured.items()
    }


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table, below a line that says where it was measured."""
    print(f"### {title}\n\n{_machine()}\n")
    print("| " + " | ".join(header) + " |")
    print("| --- " + "| ---: " * (len(header) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print(flush=True)


def _machine() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, no GPU"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    version = ".".join(map(str, sys.version_info[:2]))
    return f"{platform.machine()}, {where}; torch {torch.__version__}, Python {version}; commit {found or 'unknown'}"

"""Saving and loading a model of 100 million parameters with Adam on two workers: ours, DCP's, torch.save's.

Every save ends with its files synced to the disk, and every contestant saves the same state. Run it as
``python -m benchmarks.checkpoint [strategy] [rounds]``; about ten gigabytes of free disk are needed.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launcher.jobs.language_model import LanguageModelJob
from torch.distributed.tensor import DTensor

from benchmarks.common import print_table, run_ranks
from benchmarks.contestants import Setup
from launcher.checkpoint import CheckpointStore
from launcher.checkpoint.finding import find_newest_valid
from launcher.checkpoint.loading import read_tensors
from launcher.checkpoint.saver import Saved, Saver
from launcher.checkpoint.snapshot import Snapshot
from launcher.config.schema import Verify
from launcher.training.batches import BatchShape, TrainingData
from launcher.training.progress import Identity, Progress, take_snapshot

WORKERS = 2
REFERENCE = "DCP save"
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Measured:
    """One save or load, on one rank."""

    stall: float
    """Seconds that training stands still."""
    total: float
    """Seconds until the data is safe, or there."""
    memory: float = 0.0
    """MB of host memory above what was used before."""
    size: float = 0.0
    """MB on the disk."""
    cpu: float = 0.0
    """Seconds of this process' CPU time, which others disturb less."""


class _PeakMemory:
    """The most resident memory of this process, as seen every few milliseconds."""

    def __enter__(self) -> _PeakMemory:
        gc.collect()
        self._before = self._peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, _resident())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return max(0, self._peak - self._before) / 1e6


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


class _Timed:
    """All ranks start together, with nothing left to write from before."""

    def __enter__(self) -> _Timed:
        os.sync()
        dist.barrier()
        self._started, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu = time.process_time() - self._cpu

    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._started


class Bench:
    """One rank's contestants."""

    def __init__(self, rank: int, world_size: int, strategy: str, folder: Path) -> None:
        self.rank, self.world_size, self.folder = rank, world_size, folder
        job = LanguageModelJob(context=64, num_layers=14, num_heads=12, width=768)
        self.learner = Setup(job, strategy=strategy).learner(rank, world_size)
        data = TrainingData(job, [0], BatchShape(1, 1, world_size), rank, 0)  # type: ignore[arg-type]
        self.learner.expected_items = 1.0
        identity = Identity(strategy, "float32", "", 0, rank, world_size)
        self._take = lambda: take_snapshot(self.learner, data, identity, Progress(), None)
        self.group = dist.new_group(backend="gloo")
        self.async_saver = Saver(CheckpointStore(folder / "ours async"), rank, world_size, torch.device("cpu"))
        self.sync_saver = Saver(CheckpointStore(folder / "ours sync"), rank, world_size, torch.device("cpu"), False)
        before = _resident()
        for saver in (self.async_saver, self.sync_saver):
            saver.prepare(self.snapshot())
        self.staged = (_resident() - before) / 1e6

    def snapshot(self) -> Snapshot:
        """Of another step each time."""
        self.learner.steps += 1
        return self._take()

    def copy(self) -> Measured:
        """Not a save: one process copies as many bytes from one file to another."""
        source, target = self.folder / "bytes", self.folder / "copy"
        if self.rank == 0 and not source.exists():
            source.write_bytes(os.urandom(2**20) * (self._whole_bytes() // 2**20))
        with _Timed() as timed:
            if self.rank == 0:
                shutil.copyfile(source, target)
                _sync(target)
                seconds = timed.elapsed()
                target.unlink()
                return Measured(seconds, seconds, size=source.stat().st_size / 1e6)
        return Measured(0, 0)

    def _whole_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._take().tensors.values())

    def ours(self, saver: Saver) -> Measured:
        """A whole save: digests, manifest, commit."""
        with _PeakMemory() as peak, _Timed() as timed:
            saver.begin(self.snapshot)
            stall = timed.elapsed()
            result = saver.settle()
            total = timed.elapsed()
        assert isinstance(result, Saved), result
        memory = peak.megabytes
        if saver.asynchronous:
            memory += self.staged
        else:
            stall = total
        if self.rank == 0:
            saver.store.prune(1, 0, "", False)
        return Measured(stall, total, memory, result.num_bytes / 1e6, timed.cpu)

    def dcp_save(self) -> Measured:
        """torch's."""
        target = self._target("dcp")
        state = self.snapshot().tensors
        with _PeakMemory() as peak, _Timed() as timed:
            dcp.save(state, checkpoint_id=target)
            seconds = timed.elapsed()
        return Measured(seconds, seconds, peak.megabytes, _size(target), timed.cpu)

    def dcp_async_save(self) -> Measured:
        """torch's, in a thread."""
        target = self._target("dcp async")
        state = self.snapshot().tensors
        with _PeakMemory() as peak, _Timed() as timed:
            future: Any = dcp.async_save(state, checkpoint_id=target, process_group=self.group)
            stall = timed.elapsed()
            future.result()
            total = timed.elapsed()
        return Measured(stall, total, peak.megabytes, _size(target), timed.cpu)

    def torch_save(self) -> Measured:
        """Everything gathered on rank 0, which writes one file."""
        target = self._target("torch")
        state = self.snapshot().tensors
        with _PeakMemory() as peak, _Timed() as timed:
            whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
            if self.rank == 0:
                target.mkdir()
                torch.save(whole, target / "all.pt")
                _sync(target / "all.pt")
            dist.barrier()
            seconds = timed.elapsed()
        return Measured(seconds, seconds, peak.megabytes, _size(target), timed.cpu)

    def load(self, verify: Verify | None) -> Measured:
        """Ours: find the newest valid checkpoint, and read it into the learner's tensors."""
        store = self.sync_saver.store
        targets = self.snapshot().tensors
        with _Timed() as timed:
            if verify is None:
                checkpoint = store.candidates()[0]
            else:
                found = find_newest_valid(store, verify, False, self.rank, self.world_size).checkpoint
                assert found is not None
                checkpoint = found
            read_tensors(checkpoint, targets)
            dist.barrier()
            return Measured(timed.elapsed(), timed.elapsed())

    def dcp_load(self) -> Measured:
        """torch's."""
        targets = self.snapshot().tensors
        with _Timed() as timed:
            dcp.load(targets, checkpoint_id=self.folder / "dcp")
            return Measured(timed.elapsed(), timed.elapsed())

    def _target(self, name: str) -> Path:
        target = self.folder / name
        if self.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
        dist.barrier()
        return target


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6 if folder.exists() else 0.0


def measure(rank: int, world_size: int, strategy: str, folder: str, rounds: int) -> dict[str, list[Measured]]:
    """One rank's, in rounds whose order rotates; one round is not counted."""
    warnings.simplefilter("ignore")
    bench = Bench(rank, world_size, strategy, Path(folder))
    contestants: dict[str, Callable[[], Measured]] = {
        REFERENCE: bench.dcp_save,
        "ours, synchronous": lambda: bench.ours(bench.sync_saver),
        "ours, asynchronous": lambda: bench.ours(bench.async_saver),
        "DCP async_save": bench.dcp_async_save,
        "torch.save on rank 0": bench.torch_save,
        "a plain file copy": bench.copy,
    }
    loads: dict[str, Callable[[], Measured]] = {
        "load: DCP": bench.dcp_load,
        "load: ours, nothing verified": lambda: bench.load(None),
        "load: ours, verify=sizes": lambda: bench.load(Verify.sizes),
        "load: ours, verify=full": lambda: bench.load(Verify.full),
    }
    found: dict[str, list[Measured]] = {name: [] for name in (*contestants, *loads)}
    memory: dict[str, float] = {}
    for group in (contestants, loads):
        names = list(group)
        for number in range(rounds + 1):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                measured = group[name]()
                # What is kept from one save to the next was taken in the first.
                memory[name] = max(memory.get(name, 0.0), measured.memory)
                if number:
                    found[name].append(replace(measured, memory=memory[name]))
    return found


def main() -> None:
    """Print the table."""
    strategy = sys.argv[1] if len(sys.argv) > 1 else "fsdp"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(WORKERS, measure, strategy, folder, rounds)
    rows: list[list[object]] = []
    reference = ranks[0][REFERENCE]
    for name, first in ranks[0].items():
        slowest = [max(one, other, key=lambda m: m.total) for one, other in zip(first, ranks[1][name], strict=True)]
        cpu = [one.cpu + other.cpu for one, other in zip(first, ranks[1][name], strict=True)]
        of_reference = [(a.stall / b.total, a.total / b.total) for a, b in zip(slowest, reference, strict=True)]
        row: list[object] = [name, median(m.stall for m in slowest), median(m.total for m in slowest)]
        if name.startswith("load"):
            row += ["", "", "", "", "", ""]
        else:
            row += [median(stall for stall, _ in of_reference), median(total for _, total in of_reference)]
            row += [median(cpu) or "", f"{median(m.size for m in first):.0f}"]
            row += [f"{median(m.size / m.total for m in first if m.total):.0f}"]
            row += [f"{max(m.memory for m in first):.0f}"]
        rows.append(row)
    header = [
        "",
        "s standing still",
        "s in all",
        "stall / DCP",
        "all / DCP",
        "CPU s",
        "MB",
        "MB/s",
        "MB of memory, rank 0",
    ]
    print_table(f"100M parameters with Adam, {strategy} on {WORKERS} workers, {rounds} rounds", header, rows)


if __name__ == "__main__":
    main()

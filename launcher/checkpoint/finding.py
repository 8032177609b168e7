"""Which checkpoint to go on from, agreed by all ranks, with the reading of every byte shared among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.checkpoint.folder import Checkpoint
from launcher.checkpoint.judging import Problem, judging
from launcher.checkpoint.store import CheckpointStore, Found
from launcher.config.schema import Verify
from launcher.errors import CheckpointError

__all__ = ["find_newest_valid"]


def find_newest_valid(store: CheckpointStore, verify: Verify, trust_shared: bool, rank: int, world_size: int) -> Found:
    """``CheckpointStore.newest_valid`` by all ranks together; collective, and the same on every rank.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be used.
    """
    candidates = store.candidates() if rank == 0 else []
    passed_over: list[tuple[Path, Problem]] = []
    while True:
        offered: Checkpoint | None = None
        while rank == 0 and candidates and offered is None:
            checkpoint = candidates.pop(0)
            problem = checkpoint.problem(Verify.sizes, trust_shared)
            if problem is None:
                offered = checkpoint
            else:
                passed_over.append((checkpoint.path, problem))
        offered, passed_over = _from_first((offered, passed_over), world_size)
        if offered is None:
            break
        problem = _damage(offered, rank, world_size) if verify is Verify.full else None
        if problem is None:
            return Found(offered, tuple(passed_over))
        passed_over.append((offered.path, problem))
    if passed_over:
        listed = "\n".join(f"  {path}: {reason}" for path, reason in passed_over)
        raise CheckpointError(
            f"There is no valid checkpoint to go on from:\n{listed}\nTo begin again from the first step, move "
            f"{store.directory} away or start a new run."
        )
    return Found(None)


def _damage(checkpoint: Checkpoint, rank: int, world_size: int) -> Problem | None:
    """What is wrong with the content of a checkpoint's files, of which each rank reads its share; collective."""
    loads = [0] * world_size
    mine = []
    for name, record in sorted(checkpoint.manifest.files.items(), key=lambda item: (-item[1].size, item[0])):
        lightest = loads.index(min(loads))
        loads[lightest] += record.size
        if lightest == rank:
            mine.append(name)
    with judging() as verdict:
        checkpoint.check_digests(mine)
    problems: list[Any] = [verdict.problem]
    if world_size > 1:
        problems = [None] * world_size
        dist.all_gather_object(problems, verdict.problem)
    return next((one for one in problems if one is not None), None)


def _from_first(value: Any, world_size: int) -> Any:
    """Rank 0's value; collective."""
    values = [value]
    if world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]

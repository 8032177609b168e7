"""Which checkpoint to go on from, agreed by all ranks, with the reading of every byte shared among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.checkpoint.folder import Checkpoint
from launcher.checkpoint.judging import Problem, judging
from launcher.checkpoint.store import CheckpointStore, Found
from launcher.config.schema import Verify
from launcher.errors import CheckpointError

__all__ = ["agreed", "find_newest_valid"]


def find_newest_valid(
    store: CheckpointStore,
    verify: Verify,
    trust_shared: bool,
    rank: int,
    world_size: int,
    tried: Sequence[tuple[Path, Problem]] = (),
) -> Found:
    """``CheckpointStore.newest_valid`` by all ranks together; collective, and the same on every rank.

    Args:
        store: the run's checkpoints.
        verify, trust_shared: see ``Checkpoint.problem``.
        rank, world_size: of the default process group.
        tried: those that could not be taken up, and why; they are passed over.

    Raises:
        CheckpointError: there are checkpoints, and none of them can be used.
    """
    passed_over = list(tried)
    known = {path for path, _ in tried}
    candidates = [each for each in store.candidates() if each.path not in known] if rank == 0 else []
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
    problem: Problem | None = agreed(verdict.problem, world_size)
    return problem


def agreed(finding: Any, world_size: int) -> Any:
    """What the first of the ranks that have found something has; None if none has. Collective."""
    findings = [finding]
    if world_size > 1:
        findings = [None] * world_size
        dist.all_gather_object(findings, finding)
    return next((one for one in findings if one is not None), None)


def _from_first(value: Any, world_size: int) -> Any:
    """Rank 0's value; collective."""
    values = [value]
    if world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]

"""What an attempt begins with: a fresh learner, or one with the newest checkpoint that all ranks can read into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launcher.checkpoint import Checkpoint, CheckpointStore, Found, Manifest
from launcher.checkpoint.finding import agreed, find_newest_valid
from launcher.checkpoint.judging import Problem, judging
from launcher.config.schema import CheckpointConfig
from launcher.errors import CheckpointError, DamagedCheckpointError
from launcher.training.restoring import Reading, read
from launcher.training.step import Learner

__all__ = ["build_and_read"]


def build_and_read(
    store: CheckpointStore,
    settings: CheckpointConfig,
    rank: int,
    world_size: int,
    build: Callable[[Manifest | None], tuple[Learner, int]],
) -> tuple[Learner, int, Found, Reading | None]:
    """Build a learner, and read the newest checkpoint that there is for it; collective.

    A checkpoint whose bytes are as they were written, and are not what any learner saves, is passed over too: the one
    before it is read into a learner that is built anew. One that does not fit this learner is refused instead.

    Args:
        store, settings: of the run.
        rank, world_size: of the default process group.
        build: makes a learner that is to go on from a manifest, or begins; and says with which step its run ends.

    Returns:
        What ``build`` has made last, what was found, and what was read of it.

    Raises:
        CheckpointError: there are checkpoints, and none can be used; or the newest does not fit, on some rank.
    """
    tried: tuple[tuple[Path, Problem], ...] = ()
    while True:
        found = Found(None)
        if settings.enabled:
            found = find_newest_valid(store, settings.verify, settings.trust_shared_directory, rank, world_size, tried)
        checkpoint = found.checkpoint
        learner, steps = build(checkpoint.manifest if checkpoint is not None else None)
        if checkpoint is None:
            return learner, steps, found, None
        reading, mine = _read(learner, checkpoint, rank, world_size)
        objection: Problem | str | None = agreed(mine, world_size)
        if isinstance(objection, str):
            raise CheckpointError(objection)
        if objection is None:
            return learner, steps, found, reading
        tried = (*found.passed_over, (checkpoint.path, objection))
        del learner


def _read(
    learner: Learner, checkpoint: Checkpoint, rank: int, world_size: int
) -> tuple[Reading | None, Problem | str | None]:
    """``restoring.read``, and what keeps this rank from it: a problem of the checkpoint's, or words for the user."""
    reading = None
    with judging() as verdict:
        try:
            reading = read(learner, checkpoint, rank, world_size)
        except DamagedCheckpointError:
            raise
        except CheckpointError as error:
            return None, str(error)
    return reading, verdict.problem

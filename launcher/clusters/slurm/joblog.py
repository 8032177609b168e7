"""What a job's batch file and srun say in the job's own log, in words of a fixed form, and how that is found again."""

from __future__ import annotations

import re
from pathlib import Path

from launcher.rundir import RunDirectory
from launcher.rundir.records import tail_lines

__all__ = ["LOST", "NOT_STARTED", "TASK_ENDED", "last_words", "lost_words", "task_words"]

NOT_STARTED = "launch: the job was not started: "
"""How the batch file begins to say so."""
LOST = "launch: lost: turn "
"""How it begins to say that tasks were killed: the turn, a colon, and what srun has said of the first of them."""
TASK_ENDED = "srun: error: .*: task"
"""How srun names a task that has ended badly: ``srun: error: node2: task 1: Killed``; for grep, too."""


def last_words(run: RunDirectory, job_id: str) -> str | None:
    """Why a job has ended, or why its tasks have, as the batch file has said it last; None if it has not."""
    said = [line for line in _lines(run, job_id) if line.startswith((NOT_STARTED, LOST))]
    if not said:
        return None
    if said[-1].startswith(NOT_STARTED):
        return said[-1].removeprefix("launch: ")
    return _in_words(said[-1].removeprefix(LOST).partition(": ")[2])


def lost_words(run: RunDirectory, job_id: str, turn: int) -> str | None:
    """How a turn of the job was lost; None if its batch file has not said so."""
    start = f"{LOST}{turn}: "
    said = [line for line in _lines(run, job_id) if line.startswith(start)]
    return _in_words(said[-1].removeprefix(start)) if said else None


def task_words(run: RunDirectory, job_id: str, start: str) -> str | None:
    """What srun has said first of a task that has ended badly; None if nothing. For a job that still runs.

    Args:
        run: the run's directory.
        job_id: of the job.
        start: how the log's line begins before which nothing counts.
    """
    said: list[str] = []
    for line in _lines(run, job_id):
        said = [] if line.startswith(start) else [*said, *([line] if re.match(TASK_ENDED, line) else [])]
    return _in_words(said[0]) if said else None


def _in_words(line: str) -> str:
    """``node2: task 1: Killed`` as ``the task on node2 was ended: Killed``."""
    found = re.fullmatch(r"(?:srun: error: )?(\S+): tasks? [^:]+: (.+)", line.strip())
    return f"the launching process on {found[1]} has ended: {found[2]}" if found else line.strip()


def _lines(run: RunDirectory, job_id: str) -> list[str]:
    """The end of the job's log; an array's lies beside the runs."""
    name = f"*/{job_id}_0_log.out"
    logs: list[Path] = [*run.submission.glob(name), *run.path.parent.parent.glob(f".sweeps/{name}")]
    return [line for log in logs for line in tail_lines(log)]

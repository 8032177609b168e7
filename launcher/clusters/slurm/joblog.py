"""What a job's batch file and srun say in the job's own log, in words of a fixed form, and how that is found again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from launcher.rundir import RunDirectory
from launcher.rundir.records import tail_lines

__all__ = [
    "LOST",
    "NOT_STARTED",
    "QUEUED",
    "TASK_ENDED",
    "TURN",
    "last_words",
    "lost_words",
    "start_failures",
    "task_words",
    "unstarted_tasks",
]

TURN = "launch: turn "
"""How the batch file begins its first line in each turn: the turn, and the nodes."""
NOT_STARTED = "launch: the job was not started: "
"""How it begins to say so."""
LOST = "launch: lost: turn "
"""How it begins to say that tasks were killed, or did not start: the turn, a colon, why, mostly in srun's words, and
what comes next."""
QUEUED = "back in the queue"
"""What comes next, where it does."""
TASK_ENDED = "srun: error: .*: task"
"""How srun names a task that has ended badly: ``srun: error: node2: task 1: Killed``; for grep, too."""

_ENDED = re.compile(r"(?:srun: error: )?(?P<nodes>\S+): tasks? (?P<tasks>[^:]+): (?P<how>.+)")
_BY_ITSELF = "Exited with exit code"
_UNSTARTED = re.compile(r"srun: error: tasks? (?P<task>\d+) launch failed: (?P<why>.+)")
_OF_OTHERS = ("launch: ", "srun: ", "submitit ", "attempt ", "step ")
"""How lines of a task's log begin that do not say why Python has not started."""


def last_words(run: RunDirectory, job_id: str) -> str | None:
    """Why the job's last turn has ended, or why its tasks have, as the batch file has said it; None if it has not."""
    said = [line for line in _last_turn(_lines(run, job_id)) if line.startswith((NOT_STARTED, LOST))]
    if not said:
        return None
    if said[-1].startswith(NOT_STARTED):
        return said[-1].removeprefix("launch: ")
    turn, _, words = said[-1].removeprefix(LOST).partition(": ")
    return _in_words(run, job_id, words, turn)


def lost_words(run: RunDirectory, job_id: str, turn: int) -> str | None:
    """How a turn of the job was lost; None if its batch file has not said so."""
    start = f"{LOST}{turn}: "
    said = [line for line in _lines(run, job_id) if line.startswith(start)]
    if not said:
        return None
    return _in_words(run, job_id, said[-1].removeprefix(start).removesuffix(f"; {QUEUED}"), str(turn))


def task_words(run: RunDirectory, job_id: str, start: str) -> str | None:
    """What srun has said first of a task that has ended badly; None if nothing. For a job that still runs.

    Args:
        run: the run's directory.
        job_id: of the job.
        start: how the log's line begins before which nothing counts.
    """
    said = [line for line in _since(_lines(run, job_id), start) if re.match(TASK_ENDED, line)]
    return _in_words(run, job_id, said[0], None) if said else None


def start_failures(run: RunDirectory, job_id: str, turn: int) -> tuple[str, str] | None:
    """The nodes, in SLURM's short form, whose task was the first of this turn to end by itself, and why, as far as its
    log says; None if none has."""
    for line in _since(_lines(run, job_id), f"{TURN}{turn}"):
        found = _ENDED.fullmatch(line.strip())
        if line.startswith("srun: ") and found and found["how"].startswith(_BY_ITSELF):
            return found["nodes"], _in_words(run, job_id, line, str(turn))
    return None


def unstarted_tasks(run: RunDirectory, job_id: str, turn: int) -> Mapping[int, str]:
    """The tasks of this turn that srun says it could not start, by number, and why."""
    found = (_UNSTARTED.fullmatch(line.strip()) for line in _since(_lines(run, job_id), f"{TURN}{turn}"))
    return {int(each["task"]): f"srun could not start its task: {each['why']}" for each in found if each}


def _in_words(run: RunDirectory, job_id: str, line: str, turn: str | None) -> str:
    """``node2: task 1: Killed`` as ``the launching process on node2 has ended: Killed``.

    Args:
        run, job_id: whose log it is.
        line: of srun, with or without its beginning; or whatever else was said.
        turn: to look for more in the task's own log, if it has ended by itself; None: not to.
    """
    found = _ENDED.fullmatch(line.strip())
    if found is None:
        return line.strip()
    how, semicolon, then = found["how"].partition("; ")
    if turn is not None and how.startswith(_BY_ITSELF):
        own = _own_words(run, job_id, found["tasks"], turn)
        how += f": {own}" if own else ""
    return f"the launching process on {found['nodes']} has ended: {how}{semicolon}{then}"


def _own_words(run: RunDirectory, job_id: str, tasks: str, turn: str) -> str | None:
    """The last that the first of some tasks has said in its own log, such as why Python could not be started."""
    number = re.match(r"\d+", tasks)
    if number is None:
        return None
    lines = _since(_lines(run, job_id, int(number[0])), f"{TURN}{turn}")
    words = [line.strip() for line in lines if line.strip() and not line.startswith(_OF_OTHERS)]
    words = [line for line in words if not re.match(r"slurmstepd\S*: error: \*\*\*", line)]
    return words[-1] if words else None


def _since(lines: Iterable[str], start: str) -> list[str]:
    """What follows the last line that begins so; all of it, if there is none."""
    found: list[str] = []
    for line in lines:
        if line.startswith(start):
            found.clear()
        else:
            found.append(line)
    return found


def _last_turn(lines: Iterable[str]) -> list[str]:
    return _since(lines, TURN)


def _lines(run: RunDirectory, job_id: str, task: int = 0) -> list[str]:
    """The end of the log of the job and its first task, or of another task; an array's lies beside the runs."""
    name = f"*/{job_id}_{task}_log.out"
    logs: list[Path] = [*run.submission.glob(name), *run.path.parent.parent.glob(f".sweeps/{name}")]
    return [line for log in logs for line in tail_lines(log)]

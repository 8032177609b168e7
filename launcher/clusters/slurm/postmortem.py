"""What SLURM's record of an ended job tells of deaths of which nobody of the job could speak."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.clusters.slurm import queue
from launcher.clusters.slurm.queue import QueueError, SlurmJob
from launcher.errors import EXIT_UNWRITABLE

__all__ = ["death_words", "is_shell_killed"]

_KILLED = "0:9"
"""SLURM's ExitCode of a job whose batch file's shell was killed; of one that was cancelled, too."""
_KILLED_REASONS = ("JobLaunchFailure", "RaisedSignal:9", "NonZeroExitCode")
"""Of 22.05, and of later versions; a cancelled job has none of them."""
_NO_LOG = "0:53"
"""The same of a job whose log could not be opened on its first node."""


def is_shell_killed(job: Mapping[str, str]) -> bool:
    """Whether a job ends, or has ended, because the shell of its batch file was killed, and not on anybody's request.

    Args:
        job: as ``queue.show`` gives it.
    """
    ended = job.get("JobState") in ("COMPLETING", "FAILED")
    return ended and job.get("ExitCode") == _KILLED and job.get("Reason", "").startswith(_KILLED_REASONS)


def death_words(job: SlurmJob) -> str | None:
    """Why a job has ended, where SLURM alone knows; None if that says nothing, or SLURM has forgotten it."""
    if job.state != "FAILED":
        return None
    try:
        shown: Mapping[str, str] = queue.show(job.job_id)
    except QueueError:  # SLURM has forgotten it; the accounting may not have
        shown = {"ExitCode": (job.reason or "").removeprefix("exit code ")}
    code, first = shown.get("ExitCode", ""), shown.get("BatchHost")
    if code.startswith(f"{EXIT_UNWRITABLE}:"):
        return "nothing could be written into its directory any more: the disk is full, or a quota used up"
    if code == _NO_LOG:
        node = f"{first}, its first node," if first else "its first node"
        without = f" +cluster.sbatch.exclude={first}" if first else ""
        return (
            f"{node} could not open the job's log in the run's directory: that is not there on this node, or not "
            f"writable. Without this node: launch resume RUN{without}"
        )
    if is_shell_killed({"JobState": job.state, **shown}):
        return f"the shell of its batch file was killed{f' on {first}' if first else ''}"
    return None

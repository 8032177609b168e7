"""How one turn of a job ends: for good, for somebody to resume, or for SLURM to start the job again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from launcher.clusters.attempts import end_run
from launcher.clusters.slurm import queue
from launcher.clusters.slurm.queue import NoQueueError, QueueError
from launcher.config.schema import RunConfig
from launcher.environment import JobPlace
from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_RESUMABLE, EXIT_UNWRITABLE, RunError
from launcher.observe.terminal import say
from launcher.rundir import RunDirectory, State, Status
from launcher.rundir.cancellation import Cancellation

__all__ = ["end_without_attempt", "job_goes_on", "leave"]

_PATIENCE_SECONDS = 20.0
"""How long a silent controller is asked again; SLURM's KillWait, 30 s by default, may be running."""


def leave(
    run: RunDirectory,
    place: JobPlace,
    config: RunConfig,
    attempt: int,
    started: float,
    reason: str,
    without: Sequence[str] = (),
) -> int:
    """Stopped: for good, for somebody to resume, or for SLURM to start the job again; returns the exit code.

    Args:
        run: the run's directory.
        place: of this process, the first node's.
        config: in force.
        attempt: that has stopped, or could not go on.
        started: when it began, in seconds since 1970.
        reason: why.
        without: the names of nodes that the job is not to have again.
    """
    request = Cancellation.read(run)
    say(reason)
    if not config.cluster.requeue or (request is not None and not request.requeue):
        end_run(run, attempt, started, State.resumable, reason)
        return EXIT_RESUMABLE
    job = _job(place)
    if job is not None and job.get("JobState") != "RUNNING":
        # Cancelled, or requeued by SLURM itself: both look alike (COMPLETING) until these processes have ended, and
        # scontrol would requeue a cancelled job too.
        end_run(run, attempt, started, State.resumable, f"{reason}; SLURM has ended this turn of the job")
        return EXIT_RESUMABLE
    end_run(run, attempt, started, State.resumable, reason)
    status = Status.read(run.status)
    queued = f"{reason}; back in the queue"
    status.now(State.submitted, attempt=attempt + 1, hosts=(), reason=queued).write(run.status)
    try:
        if without:
            queue.requeue_without(place.job_id, without)
        else:
            queue.requeue(place.job_id)
    except QueueError as error:
        silent = "SLURM could not be asked, and " if job is None else ""
        why = f"{reason}; {silent}it could not be requeued: {error}"
        status.now(State.resumable, reason=why).write(run.status)
        say(why, error=True)
        return EXIT_RESUMABLE
    Cancellation.clear(run)  # last: whoever has asked waits for it
    return EXIT_FINISHED


def _job(place: JobPlace) -> dict[str, str] | None:
    """What SLURM says of the job; None if it cannot be asked here, or does not answer."""
    try:
        return queue.show(place.job_id, _PATIENCE_SECONDS)
    except QueueError:
        return None


def job_goes_on(place: JobPlace) -> bool:
    """Whether SLURM still counts on this turn of the job: it may have given up a node, this one included."""
    try:
        job = queue.show(place.job_id)
    except NoQueueError:  # as in some containers
        return True
    except QueueError:  # this node is cut off
        return False
    return job.get("JobState") == "RUNNING" and job.get("Restarts", "0") == str(place.turn)


def end_without_attempt(run: RunDirectory, reason: str) -> int:
    """The run has failed, and no attempt's end can tell; if that cannot be written down, the exit code says so."""
    code = EXIT_FAILED
    try:
        Status.read(run.status).now(State.failed, reason=reason).write(run.status)
    except (OSError, RunError):
        code = EXIT_UNWRITABLE
    with suppress(OSError):  # the log may be on the same disk
        print(f"launch: {reason}", file=sys.stderr, flush=True)
    return code

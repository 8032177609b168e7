"""``launch cancel RUN``: end a run for good; with ``--save``, have it save first, so that it can be resumed."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.clusters.folders import shown
from launcher.clusters.slurm import queue
from launcher.clusters.slurm.queue import QueueError
from launcher.errors import EXIT_FINISHED, RunError
from launcher.rundir import RunDirectory, State
from launcher.rundir.cancellation import Cancellation
from launcher.rundir.find import find_run
from launcher.rundir.lock import Holder
from launcher.verbs.view import View, views
from launcher.verbs.words import VerbParser

__all__ = ["act"]

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0


def act(words: Sequence[str]) -> int:
    """Cancel a run, and wait until it has ended; returns the exit code.

    Raises:
        RunError: no run is meant, or several; or nobody is at work on it; or not here.
    """
    parser = VerbParser("cancel", "End a run that is being trained, is submitted, or waits in the queue.")
    parser.add_argument("--save", action="store_true", help="stop after the current step, and save: it can be resumed")
    parser.add_argument(
        "--requeue", action="store_true", help="with --save, on SLURM: back into the queue, to go on by itself"
    )
    parser.add_argument("--no-wait", action="store_true", help="return at once, not when it has ended")
    options = parser.parse_args(list(words))
    if options.requeue and not options.save:
        parser.error("--requeue needs --save")
    run = find_run(options.run, Path(options.runs_root))
    (view,) = views([run])
    if view.is_alive is False or (view.launcher is None and _has_ended(view)):
        raise RunError(_nobody(view))
    here = view.launcher is not None and view.launcher.host == socket.gethostname()
    if view.job_id is not None and view.slurm_problem is not None and not here:
        raise RunError(
            f"SLURM does not answer about job {view.job_id} of the run {run.path} ({view.slurm_problem}): nothing was "
            "cancelled. Try again when it does; where there is no squeue, on a login node."
        )
    if view.job is not None and view.job.is_alive:
        _cancel_job(view, options.save, options.requeue)
    elif options.requeue:
        raise RunError(f"--requeue: the run {run.path} is no job of SLURM: use --save alone, and launch resume.")
    else:
        assert view.launcher is not None
        _cancel_here(run, view.launcher, options.save)
    if not options.no_wait and not options.requeue:
        _wait(run)
    return EXIT_FINISHED


def _has_ended(view: View) -> bool:
    """Whether the run's own records say that no job goes on with it, whatever SLURM says."""
    return view.status is not None and view.status.state in (State.finished, State.failed)


def _nobody(view: View) -> str:
    explained = f" ({view.explanation})" if view.explanation else ""
    return f"Nobody is at work on the run {view.run.path}: nothing to cancel: it is {view.condition}{explained}."


def _cancel_here(run: RunDirectory, launcher: Holder, save: bool) -> None:
    if launcher.host != socket.gethostname():
        raise RunError(f"The run {run.path} is launched by {launcher}: run launch cancel there.")
    Cancellation.ask(run, save)
    try:
        os.kill(launcher.pid, signal.SIGTERM)
    except ProcessLookupError:
        raise RunError(f"The run {run.path} has just ended.") from None
    except PermissionError:
        Cancellation.clear(run)
        raise RunError(f"The run {run.path} is launched by {launcher}, another user's: you cannot end it.") from None
    print(f"asked {launcher} to {'stop and save' if save else 'end'}", flush=True)


def _cancel_job(view: View, save: bool, requeue: bool) -> None:
    assert view.job is not None
    assert view.status is not None
    job_id, waits = view.job.job_id, view.job.state == "PENDING"
    request = Cancellation.ask(view.run, save, requeue)
    try:
        if save and not waits:
            queue.cancel(job_id, signal="USR2")
            print(f"asked job {job_id} to stop and save", flush=True)
            return
        if requeue:
            raise RunError(f"--requeue: job {job_id} waits in the queue as it is.")
        queue.cancel(job_id)
    except QueueError as error:
        Cancellation.clear(view.run)
        raise RunError(f"The run {view.run.path} could not be cancelled: {error}.") from error
    if waits:  # nobody is there to write it down
        state = State.resumable if save else State.failed
        view.status.now(state, reason=str(request)).write(view.run.status)
    print(f"cancelled job {job_id}", flush=True)


def _wait(run: RunDirectory) -> None:
    """Until nobody is at work on the run; Ctrl-C leaves it to end by itself."""
    try:
        while True:
            (view,) = views([run])
            if view.is_alive is False:
                break
            time.sleep(_POLL_SECONDS if view.job is None else _LOOK_SECONDS)
    except KeyboardInterrupt:
        return
    explained = f": {view.explanation}" if view.explanation else ""
    print(f"the run {shown(run.path)} is {view.condition}{explained}")

"""``launch cancel RUN``: end a run for good; with ``--save``, have it stop and save.

A job of SLURM that has saved goes back into the queue and on by itself, as it does before its time limit. With
``--no-requeue``, and on this machine, it stays stopped until it is resumed.
"""

from __future__ import annotations

import argparse
import os
import shlex
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
from launcher.verbs.view import View, configured, views
from launcher.verbs.words import VerbParser

__all__ = ["act"]

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0


def act(words: Sequence[str]) -> int:
    """Cancel a run, and wait until it has ended, or is back in the queue; returns the exit code.

    Raises:
        RunError: no run is meant, or several; or nobody is at work on it; or not here.
    """
    options = _options(words)
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
        goes_on = options.save and _requeues(view, options.requeue)
        _cancel_job(view, options.save, goes_on)
    elif options.requeue:
        raise RunError(f"--requeue: the run {run.path} is no job of SLURM: use --save alone, and launch resume.")
    else:
        assert view.launcher is not None
        goes_on = False
        _cancel_here(run, view.launcher, options.save)
    if not options.no_wait:
        _wait(run, goes_on)
    return EXIT_FINISHED


def _has_ended(view: View) -> bool:
    """Whether the run's own records say that no job goes on with it, whatever SLURM says."""
    return view.status is not None and view.status.state in (State.finished, State.failed)


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = VerbParser("cancel", "End a run that is being trained, is submitted, or waits in the queue.")
    parser.add_argument(
        "--save",
        action="store_true",
        help="stop after the current step, and save; a job goes back into the queue and on",
    )
    parser.add_argument(
        "--requeue",
        action=argparse.BooleanOptionalAction,
        help="with --save, of a job of SLURM: whether it goes on by itself (default: as cluster.requeue says), or "
        "stays stopped until launch resume",
    )
    parser.add_argument("--no-wait", action="store_true", help="return at once, not when it has ended")
    options = parser.parse_args(list(words))
    if options.requeue is not None and not options.save:
        parser.error(f"--{'' if options.requeue else 'no-'}requeue needs --save")
    return options


def _requeues(view: View, asked: bool | None) -> bool:
    """Whether a job that has saved goes back into the queue; SLURM refuses that where ``cluster.requeue`` is false."""
    assert view.status is not None
    allowed = configured(view.run, view.status.attempt, "cluster", "requeue") is not False
    if asked and not allowed:
        raise RunError(
            f"--requeue: the run {view.run.path} was submitted with cluster.requeue=false, and SLURM would refuse: use "
            "--save alone, and launch resume."
        )
    return allowed and asked is not False


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
    if waits and requeue:
        name = shlex.quote(shown(view.run.path))
        raise RunError(
            f"Job {job_id} waits in the queue ({view.job.reason}) and goes on by itself: there is nothing to save. To "
            f"take it out, to be resumed: launch cancel {name} --save --no-requeue. To end it for good: launch "
            f"cancel {name}."
        )
    request = Cancellation.ask(view.run, save, requeue)
    try:
        if save and not waits:
            queue.cancel(job_id, signal="USR2")
            print(f"asked job {job_id} to stop and save{', and to go on' if requeue else ''}", flush=True)
            return
        queue.cancel(job_id)
    except QueueError as error:
        Cancellation.clear(view.run)
        raise RunError(f"The run {view.run.path} could not be cancelled: {error}.") from error
    if waits:  # nobody is there to write it down
        state = State.resumable if save else State.failed
        view.status.now(state, reason=str(request)).write(view.run.status)
    print(f"cancelled job {job_id}", flush=True)


def _wait(run: RunDirectory, goes_on: bool) -> None:
    """Until nobody is at work on the run, or it is back in the queue; Ctrl-C leaves it to end by itself."""
    try:
        while True:
            # The first node takes the request away once SLURM has the job again, and has written that down before.
            is_back = goes_on and Cancellation.read(run) is None
            (view,) = views([run])
            if view.is_alive is False or is_back:
                break
            time.sleep(_POLL_SECONDS if view.job is None else _LOOK_SECONDS)
    except KeyboardInterrupt:
        return
    explained = f": {view.explanation}" if view.explanation else ""
    print(f"the run {shown(run.path)} is {view.condition}{explained}")
    name = shlex.quote(shown(run.path))
    if goes_on and view.is_alive is not False:
        print(f"job {view.job_id} goes on by itself; to see when: launch status {name}")
        print(f"to keep it stopped: launch cancel {name} --save --no-requeue; to end it for good: launch cancel {name}")
    elif view.condition == State.resumable.value:
        print(f"to go on: launch resume {name}")

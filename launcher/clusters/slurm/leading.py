"""The first node's part in a job: it enters the run, says which attempt begins, and decides how the job ends."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.clusters.agent import StopForwarder
from launcher.clusters.attempts import (
    begin_attempt,
    end_run,
    mark_stopping,
    record_lost_attempts,
    record_restart,
    reported_steps,
)
from launcher.clusters.deaths import unknown_death
from launcher.clusters.entering import has_finished
from launcher.clusters.progress import Restarts, lost_in_a_row, where
from launcher.clusters.slurm import queue
from launcher.clusters.slurm.channel import Channel, Directive, open_channel
from launcher.clusters.slurm.ending import end_without_attempt, job_goes_on, leave
from launcher.clusters.slurm.gathering import MissingNodesError, gather
from launcher.clusters.slurm.joblog import lost_words, task_words
from launcher.clusters.slurm.node import use_network, work
from launcher.clusters.slurm.watch import Deadline
from launcher.config.files import load_config
from launcher.config.schema import RunConfig
from launcher.config.sizes import misfits, node_range, usable_nodes, world_size
from launcher.environment import JobPlace
from launcher.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REQUEST, EXIT_RESUMABLE, RequestError, RunError
from launcher.observe.terminal import say
from launcher.rundir import RunDirectory, State, Status
from launcher.rundir.cancellation import Cancellation, is_cancelled_at_once
from launcher.rundir.failures import Failure, first_failure
from launcher.rundir.fence import Fence, current_attempt
from launcher.rundir.lock import RunLock
from launcher.rundir.records import drop_cut_line, recording

if TYPE_CHECKING:
    from launcher.training.loop import Outcome

__all__ = ["lead"]

_LOCK_PATIENCE_SECONDS = 30.0
_REPORTS_SECONDS = 30.0
"""How long the other nodes may take to end their workers and write down why."""
_LAST_REPORTS_SECONDS = 8.0
"""The same once this process is asked to end, as srun asks it when another task has died: KillWait follows."""
_FAREWELL_SECONDS = 10.0


def lead(run: RunDirectory, config: RunConfig, place: JobPlace, submission: Path, forwarder: StopForwarder) -> int:
    """Bring the run as far as this turn of the job can; returns the exit code.

    Args:
        run: the run's directory.
        config: as it was submitted.
        place: of this process.
        submission: the folder of what was sent.
        forwarder: of requests to stop; listening.
    """
    timeout = float(config.cluster.rendezvous_timeout_seconds)
    try:
        channel = open_channel(place, config.cluster.interface, timeout, submission)
    except RunError as error:
        end_without_attempt(run, str(error))
        return EXIT_FAILED
    use_network(config.cluster.interface, channel.address)
    channel.arrive()
    try:
        code = _Turn(run, place, channel, submission, forwarder).run()
    except (OSError, RequestError) as error:  # a full disk, a damaged file: not a mistake of ours
        code = end_without_attempt(run, str(error))
    except Exception as error:  # a mistake of ours: the job ends, and the run is not left as if it went on
        traceback.print_exc()
        code = end_without_attempt(run, f"the first node failed: {type(error).__name__}: {error}")
    channel.direct(Directive(exit_code=code))
    channel.wait_until_ended("all", place.num_nodes, lambda: _FAREWELL_SECONDS)
    return code


@dataclass
class _Turn:
    """One time that SLURM has started the job."""

    _run: RunDirectory
    _place: JobPlace
    _channel: Channel
    _submission: Path
    _forwarder: StopForwarder
    _lock: RunLock | None = None
    _first: int | None = None
    """The attempt that follows the submission."""
    _num_nodes: int = 0
    """That train, of those that there are."""

    def run(self) -> int:
        run, forwarder = self._run, self._forwarder
        config = load_config(run.configs()[-1])
        if has_finished(run, config):
            say(f"the run {run.path} has finished")
            return EXIT_FINISHED
        if is_cancelled_at_once(run):
            return end_without_attempt(run, str(Cancellation.read(run)))
        attempt = self._take_over()
        config = load_config(run.config_of(attempt))
        lost = lost_in_a_row(run) if self._place.turn > 0 else 0
        if reason := self._hopeless(config, lost):
            return end_without_attempt(run, reason)
        started = time.time()
        try:
            stopped = gather(self._channel, run, self._submission, forwarder)
        except MissingNodesError as error:
            return self._leave_without(config, attempt, started, error)
        if stopped is not None:
            return self._leave(config, attempt, started, stopped)
        forwarder.on_request = lambda: mark_stopping(run)
        Deadline(self._place.job_id, config.cluster.signal_lead_seconds, run, forwarder.request)
        self._first = attempt if self._place.turn == 0 else None
        return self._attempts(config, attempt, Restarts(run, config, already=lost))

    def _leave_without(self, config: RunConfig, attempt: int, started: float, error: MissingNodesError) -> int:
        """Nodes have not come: without them if the job's range allows that or SLURM has others, or failed."""
        place, nodes, allowed = self._place, error.nodes, node_range(config)
        enough = allowed.is_elastic and place.num_nodes - len(nodes) >= allowed.least
        if config.cluster.requeue and (enough or queue.has_others(place.job_id, nodes, self._submission)):
            reason = f"{error}; going on without"
            return leave(self._run, self._place, config, attempt, started, reason, without=error.nodes)
        end_run(self._run, attempt, started, State.failed, str(error))
        say(f"launch: {error}", error=True)
        return EXIT_FAILED

    def _hopeless(self, config: RunConfig, lost: int) -> str | None:
        """Why there is to be no attempt in this turn."""
        there, allowed = self._place.num_nodes, config.cluster.max_restarts
        self._num_nodes = usable_nodes(config, there)
        if lost > allowed:
            return (
                f"given up: the last {lost} attempt(s) have published no newer checkpoint, and "
                f"cluster.max_restarts={allowed}"
            )
        if self._num_nodes == 0:  # somebody has changed the job: what was submitted fits
            why = " ".join(map(str, misfits(config, world_size(config, there))))
            return f"the job has {there} node(s), which cannot share the run: {why}"
        return None

    def _take_over(self) -> int:
        """Become the current attempt: what is left of an earlier one, on a node that SLURM has given up, ends."""
        with recording(self._run.path):
            return self._number_taken()

    def _number_taken(self) -> int:
        run = self._run
        drop_cut_line(run.metrics)
        drop_cut_line(run.attempts)
        status = Status.read(run.status)
        before = status.attempt - 1 if status.state is State.submitted else status.attempt
        attempt = max(before, current_attempt(run), *run.begun_attempts(), -1) + 1
        Fence(run, attempt).put_up()
        previous = None
        try:
            self._lock = RunLock.take(run, _LOCK_PATIENCE_SECONDS)
            previous = self._lock.previous
            self._lock.sign(attempt)
        except RunError as error:  # the file server has not noticed yet that a lost node is gone; the fence holds
            say(f"warning: going on without the run's lock: {error}", error=True)
        words = lost_words(run, self._place.job_id, self._place.turn - 1)
        record_lost_attempts(run, previous, before=attempt, reason=words)
        status = Status.read(run.status)
        status = status.now(State.running, attempt=attempt, hosts=(), job_id=self._place.job_id, reason=None)
        status.write(run.status)
        return attempt

    def _attempts(self, config: RunConfig, attempt: int, restarts: Restarts) -> int:
        """Attempts until one ends well, on request, or so that another would not help here."""
        run, channel = self._run, self._channel
        while True:
            begin_attempt(run, attempt, self._forwarder.requested is not None, channel.hosts(self._num_nodes))
            started = time.time()
            say(f"{self._begins(attempt)}, {where(restarts.newest_step)}, on {self._in_words()}")
            directive = Directive(attempt, self._num_nodes)
            channel.direct(directive)
            result = work(run, directive, channel, self._forwarder)
            if isinstance(result, dict):
                return self._end(config, attempt, started, result[0])
            silent = channel.wait_until_ended(attempt, self._num_nodes, self._reports_patience)
            if not Fence(run, attempt).holds():
                return EXIT_RESUMABLE
            if is_cancelled_at_once(run):
                end_run(run, attempt, started, State.failed, str(Cancellation.read(run)))
                return EXIT_FAILED
            if not job_goes_on(self._place):
                say("SLURM has ended this turn of the job: not restarting here", error=True)
                return EXIT_RESUMABLE
            if silent:
                return self._leave(config, attempt, started, self._gone(attempt, silent))
            failure = first_failure(run, attempt, result) or unknown_death(run, attempt)
            refusal = self._refusal(attempt, started, failure, restarts)
            if refusal is not None:
                return failure.exit_code
            attempt += 1

    def _begins(self, attempt: int) -> str:
        """The beginning of an attempt's first line in the job's log."""
        return f"attempt {attempt} of {self._run.path}"

    def _reports_patience(self) -> float:
        return _REPORTS_SECONDS if self._forwarder.requested is None else _LAST_REPORTS_SECONDS

    def _gone(self, attempt: int, nodes: Sequence[int]) -> str:
        """Why an attempt has failed of which some nodes' tasks say nothing: another one here would wait for them."""
        said = task_words(self._run, self._place.job_id, self._begins(attempt))
        return said or f"nothing more was heard of {', '.join(self._channel.names(nodes))}"

    def _leave(self, config: RunConfig, attempt: int, started: float, reason: str) -> int:
        return leave(self._run, self._place, config, attempt, started, reason)

    def _in_words(self) -> str:
        used, there = self._num_nodes, self._place.num_nodes
        return f"{used} node(s)" if used == there else f"{used} of {there} nodes, which the global batch divides over"

    def _refusal(self, attempt: int, started: float, failure: Failure, restarts: Restarts) -> str | None:
        """Write down a failure; why no other attempt follows it in this allocation, or None if one does."""
        run = self._run
        reason = failure.reason
        has_stepped = len(reported_steps(run, attempt)) > 0
        refusal = restarts.refusal(failure, has_stepped, self._forwarder.requested is not None)
        explained = f"{reason} ({refusal})" if refusal else reason
        refused = failure.exit_code == EXIT_REQUEST and attempt == self._first
        end_run(run, attempt, started, State.failed, explained, goes_on=refusal is None, refused=refused)
        if refusal:
            say(refusal)
        say(str(failure), error=True)
        if refusal is None:
            record_restart(run, attempt + 1, restarts.newest_step or 0, reason)
            say(f"restarting: attempt {attempt + 1}, {where(restarts.newest_step)} ({reason})")
        return refusal

    def _end(self, config: RunConfig, attempt: int, started: float, outcome: Outcome) -> int:
        if outcome.finished:
            end_run(self._run, attempt, started, State.finished, None)
            return EXIT_FINISHED
        asked = Cancellation.read(self._run) or self._forwarder.requested or "a signal to a worker"
        return self._leave(config, attempt, started, f"stopped on request ({asked}) after step {outcome.step}")

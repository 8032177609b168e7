"""One node's part in a job: the task that srun starts on it, and that starts the workers there.

The first node leads (see ``leading``); the others do what it says.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.clusters.agent import Node, StopForwarder, WorkersDiedError, run_workers
from launcher.clusters.deaths import silent_death
from launcher.clusters.slurm.channel import Channel, Directive, join
from launcher.clusters.slurm.network import address_towards, interface_of
from launcher.clusters.slurm.watch import FailureWatch, watch_fence, watch_shell
from launcher.config.files import load_config
from launcher.config.schema import RunConfig
from launcher.environment import JobPlace
from launcher.errors import EXIT_FAILED, EXIT_UNWRITABLE, RunError
from launcher.rundir import RunDirectory
from launcher.rundir.access import restrict_umask
from launcher.rundir.cancellation import is_cancelled_at_once
from launcher.rundir.failures import Failure
from launcher.rundir.fence import Fence

if TYPE_CHECKING:
    from launcher.training.loop import Outcome

__all__ = ["main", "use_network", "work"]

_DECISION_SECONDS = 180.0
"""How long the first node may take to decide what comes after a failure."""


def main(run_path: str, attempt: int, submission: str, folder: str) -> None:
    """What submitit calls in each task; ends the process with the run's exit code.

    Args:
        run_path: the run's directory.
        attempt: the one that this job was submitted for; SLURM may start the job again later.
        submission: the folder of what was sent, in which the nodes find each other.
        folder: the folder to work in.
    """
    restrict_umask()
    place = JobPlace.from_environment(os.environ)
    os.chdir(folder)
    sys.path.append(folder)  # after the snapshot, for what .gitignore has left out of that
    run, forwarder = RunDirectory(Path(run_path)), StopForwarder()
    forwarder.on_request = lambda: None  # a second signal is no reason to give up what the first has asked for
    forwarder.ends_at_once = lambda: is_cancelled_at_once(run)
    config = load_config(run.config_of(attempt))
    with forwarder.listening():  # in place of submitit's handlers, which would requeue before anything is saved
        if config.cluster.requeue:
            watch_shell(place, forwarder)
        try:
            if place.node == 0:
                from launcher.clusters.slurm.leading import lead

                code = lead(run, config, place, Path(submission), forwarder)
            else:
                code = _follow(run, config, place, Path(submission), forwarder)
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # this task's own log is on a disk that is full
            code = EXIT_UNWRITABLE
    os._exit(code)  # no thread of a store that is gone keeps the node


def _follow(run: RunDirectory, config: RunConfig, place: JobPlace, submission: Path, forwarder: StopForwarder) -> int:
    try:
        channel = join(place, config.cluster.rendezvous_timeout_seconds, submission)
    except RunError as error:
        print(f"launch: {error}", file=sys.stderr)
        return EXIT_FAILED
    use_network(config.cluster.interface, channel.address)
    channel.arrive()
    timeout: float | None = config.cluster.rendezvous_timeout_seconds
    while True:
        try:
            directive = channel.next_directive(timeout)
        except Exception as error:  # of torch's store
            print(f"launch: the first node ({channel.address}) is gone: {error}", file=sys.stderr)
            return EXIT_FAILED
        if directive.attempt is None:
            channel.say_ended("all")
            return directive.exit_code
        if place.node >= directive.num_nodes:
            print(f"attempt {directive.attempt}: not needed here, {directive.num_nodes} node(s) train", flush=True)
            timeout = None
            continue
        try:
            work(run, directive, channel, forwarder)
            channel.say_ended(directive.attempt)
        except RuntimeError as error:  # of torch's store
            print(f"launch: the first node ({channel.address}) is gone: {error}", file=sys.stderr)
            return EXIT_FAILED
        timeout = _DECISION_SECONDS


def work(
    run: RunDirectory, directive: Directive, channel: Channel, forwarder: StopForwarder
) -> dict[int, Outcome] | list[Failure]:
    """This node's part of an attempt.

    Returns:
        The outcome of each rank here; or, if the attempt has failed, those deaths here that nobody else explains.
    """
    place, attempt = channel.place, directive.attempt
    assert attempt is not None
    num_workers = load_config(run.config_of(attempt)).cluster.processes_per_node
    assert num_workers is not None
    watched, failures = watch_fence(Fence(run, attempt)), FailureWatch(channel, attempt)
    node = Node(place.node, directive.num_nodes, channel.address, channel.port, failures.has_failed)
    log = run.agent_log(attempt, place.node)
    try:
        return run_workers(run.path, attempt, num_workers, log, forwarder, node)
    except WorkersDiedError as died:
        first = place.node * num_workers
        silent = [silent_death(run, attempt, first + rank, code) for rank, code in died.deaths.items()]
        for failure in silent:
            if not run.rank_failure(attempt, failure.rank).exists():
                with suppress(OSError):
                    failure.write(run.rank_failure(attempt, failure.rank))
        channel.say_failed(attempt)
        return silent
    finally:
        watched.set()
        failures.end()


def use_network(interface: str | None, other: str) -> None:
    """Tell the workers' libraries which interface leads to the other nodes, unless the user has.

    Args:
        interface: that the configuration names; NCCL chooses by itself otherwise, as it knows InfiniBand.
        other: another node's address.
    """
    if interface is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := interface or interface_of(address_towards(other))):
        os.environ["GLOO_SOCKET_IFNAME"] = name  # or gloo would resolve this host's name

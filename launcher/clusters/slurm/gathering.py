"""On the first node: until all nodes of the job have come; or which have not, and why, as far as that is known."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.clusters.agent import StopForwarder
from launcher.clusters.slurm import queue
from launcher.clusters.slurm.channel import Channel
from launcher.clusters.slurm.joblog import start_failures, unstarted_tasks
from launcher.clusters.slurm.nodes import why_silent
from launcher.clusters.slurm.notes import complaint_file, first_node_problem
from launcher.environment import JobPlace
from launcher.rundir import RunDirectory
from launcher.rundir.cancellation import Cancellation

__all__ = ["MissingNodesError", "gather"]

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
"""Between two looks at what is written, which may be on a file server."""
_MISSING = "node(s) that did not join the run: "


class MissingNodesError(Exception):
    """Nodes of the job have not arrived in time; says which, and why as far as that is known.

    Args:
        message: for the user.
        nodes: their names.
    """

    def __init__(self, message: str, nodes: Sequence[str]) -> None:
        super().__init__(message)
        self.nodes = nodes


def gather(channel: Channel, run: RunDirectory, submission: Path, forwarder: StopForwarder) -> str | None:
    """Wait for all nodes.

    Args:
        channel: that they join.
        run: whose log srun writes into.
        submission: the folder in which a node that cannot come says why.
        forwarder: of requests to stop.

    Returns:
        Why the job is to stop before it has begun; None if all have come.

    Raises:
        MissingNodesError: some have not.
    """
    place, looked = channel.place, 0.0
    deadline = time.monotonic() + channel.timeout_seconds
    while (missing := channel.missing()) and forwarder.requested is None:
        known: dict[int, str] = {}
        is_over = time.monotonic() > deadline
        if is_over or time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            known = _complaints(missing, place, run, submission)
        if known or is_over:  # first: who has complained ends, and srun then ends all
            silent = list(known) or missing
            raise MissingNodesError(_explain(channel, silent, known), channel.names(silent))
        time.sleep(_POLL_SECONDS)
    if forwarder.requested is None:
        return None
    return _stopped(place, run, submission, forwarder.requested)


def _complaints(missing: Sequence[int], place: JobPlace, run: RunDirectory, submission: Path) -> dict[int, str]:
    """Of those nodes of which it is known already that they do not come, why."""
    known = dict(unstarted_tasks(run, place.job_id, place.turn))
    for node in missing:
        file = complaint_file(submission, place.job_id, place.turn, node)
        if file.exists():
            known[node] = file.read_text(encoding="utf-8").strip()
    return {node: known[node] for node in missing if node in known}


def _explain(channel: Channel, missing: Sequence[int], reasons: Mapping[int, str]) -> str:
    each = (
        f"{name} ({node + 1} of {channel.place.num_nodes}): {reasons.get(node) or why_silent(name)}"
        for node, name in zip(missing, channel.names(missing), strict=True)
    )
    return _MISSING + "; ".join(each)


def _stopped(place: JobPlace, run: RunDirectory, submission: Path, asked: str) -> str:
    """Asked to stop before all had come: by somebody, or by srun, which ends all tasks once one has failed.

    Raises:
        MissingNodesError: by srun.
    """
    late = first_node_problem(submission, place.job_id, place.turn)
    if late.exists():  # the others have gone by now, with an exit code of their own
        return f"{late.read_text(encoding='utf-8').strip()}; it has come since then"
    failed = start_failures(run, place.job_id, place.turn)
    if failed is not None and Cancellation.read(run) is None:
        nodes, words = failed
        raise MissingNodesError(f"{_MISSING}{nodes}: {words}", queue.hostnames(nodes))
    return f"stopped on request ({asked}) before it began"

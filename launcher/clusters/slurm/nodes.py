"""What SLURM knows of a job's nodes: their names, where it reaches them, and why one is silent."""

from __future__ import annotations

from launcher.clusters.slurm import queue
from launcher.clusters.slurm.queue import QueueError
from launcher.environment import JobPlace

__all__ = ["node_names", "slurm_address", "why_silent"]


def slurm_address(node: str) -> str:
    """What SLURM itself connects to."""
    try:
        words = queue.run(["scontrol", "--oneliner", "show", "node", node]).split()
    except QueueError:
        return node
    return next((word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr=")), node)


def node_names(place: JobPlace) -> list[str]:
    """Of the whole job, in the order of its tasks; numbers where SLURM cannot be asked."""
    try:
        names = queue.hostnames(place.node_list)
    except QueueError:
        names = []
    return names if len(names) == place.num_nodes else [f"node {number}" for number in range(place.num_nodes)]


def why_silent(node: str) -> str:
    """What SLURM says of a node from which nothing was heard."""
    try:
        state = queue.run(["sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%T|%E"]).split("\n")[0]
    except QueueError as error:
        return f"nothing was heard of it, and SLURM cannot be asked ({error})"
    word, _, reason = state.partition("|")
    said = f"{word}, {reason.strip()}" if reason.strip() not in ("", "none") else word
    return f"nothing was heard of it (SLURM: {said}); its task's own log is in the run's submission folder"

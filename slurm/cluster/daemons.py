"""munged, slurmctld and slurmd: started on their hosts, as daemons that the host's first process inherits."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress

from .configuration import HEAD, Options, Places
from .errors import ClusterError
from .hosts import in_host, is_alive
from .processes import daemon_environment, do

__all__ = ["kill_slurmd", "node_states", "slurmd_is_alive", "start_controller", "start_slurmd", "wait_until_idle"]

_IDLE_TIMEOUT_SECONDS = 45.0


def start_controller(places: Places) -> None:
    """munged, then slurmctld."""
    munged = [
        "munged",
        f"--key-file={places.munge_key}",
        f"--socket={places.munge_socket}",
        f"--pid-file={places.pid('munged')}",
        f"--log-file={places.log('munged')}",
        f"--seed-file={places.directory / 'munge.seed'}",
    ]
    _start(places, HEAD, munged)
    _start(places, HEAD, ["slurmctld", "-f", str(places.slurm_conf)])


def start_slurmd(places: Places, node: str) -> None:
    """A node's daemon; one that runs already goes on."""
    if not slurmd_is_alive(places, node):
        _start(places, node, ["slurmd", "-N", node, "-f", str(places.slurm_conf)])


def kill_slurmd(places: Places, node: str) -> None:
    """SIGKILL to a node's slurmd alone: the steps that it has started live on."""
    if slurmd_is_alive(places, node):
        do(in_host(places, node, ["kill", "-KILL", _slurmd_pid(places, node)]))


def slurmd_is_alive(places: Places, node: str) -> bool:
    """Whether a node's slurmd runs."""
    with suppress(ClusterError, OSError):
        words = in_host(places, node, ["cat", f"/proc/{_slurmd_pid(places, node)}/comm"])
        return do(words).strip().startswith("slurmd")
    return False


def node_states(places: Places) -> dict[str, str]:
    """SLURM's own word for each node, such as IDLE, ALLOCATED, DOWN*."""
    words = in_host(places, HEAD, ["sinfo", "--noheader", "--Node", "--format=%N %T"])
    environment = {**daemon_environment(places.directory), "SLURM_CONF": str(places.slurm_conf)}
    return {
        name: state.upper()
        for name, state in (line.split() for line in do(words, environment=environment).splitlines())
    }


def wait_until_idle(places: Places, options: Options) -> None:
    """Until every node of a new cluster can take work.

    Raises:
        ClusterError: not in time, with the ends of the daemons' logs.
    """
    deadline = time.monotonic() + _IDLE_TIMEOUT_SECONDS
    states: dict[str, str] = {}
    while time.monotonic() < deadline:
        with suppress(ClusterError):  # the controller does not answer yet
            states = node_states(places)
            if all(states.get(name) == "IDLE" for name in options.names):
                return
        time.sleep(0.1)
    logs = "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(places.logs.glob("*.log")))
    raise ClusterError(f"the nodes are not idle after {_IDLE_TIMEOUT_SECONDS:.0f} s: {states or 'no answer'}\n{logs}")


def _start(places: Places, host: str, command: list[str]) -> None:
    """Start a program that puts itself into the background."""
    assert is_alive(places, host)
    log = places.log(f"start-{host}")
    with log.open("ab") as output:
        done = subprocess.run(
            in_host(places, host, command, inside=True),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=daemon_environment(places.directory),
            timeout=_IDLE_TIMEOUT_SECONDS,
            check=False,
        )
    if done.returncode != 0:
        raise ClusterError(f"{command[0]} on {host} ended with {done.returncode}: {log.read_text().strip()[-1500:]}")


def _slurmd_pid(places: Places, node: str) -> str:
    return places.pid(f"slurmd-{node}").read_text().strip()

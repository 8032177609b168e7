"""How the nodes of a job find each other, and what they tell each other: a store that the first of them opens.

The first node binds a free port and leaves its address in the run's directory; the others wait for that. Then all say
that they are there; the first says which attempt begins, and how the job ends.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from launcher.clusters.slurm import network
from launcher.clusters.slurm.nodes import node_names, slurm_address, why_silent
from launcher.clusters.slurm.notes import address_file, complaint_file, first_node_problem
from launcher.environment import JobPlace
from launcher.errors import RunError
from launcher.rundir.records import read_json, recording, write_json

__all__ = ["Channel", "Directive", "join", "open_channel"]

_POLL_SECONDS = 0.1
_IDLE_SECONDS = 1.0
"""Between two looks of a node that does not train."""
_ANSWER = timedelta(seconds=20)
"""Of the store, to anything but waiting."""


@dataclass(frozen=True)
class Directive:
    """What all nodes are to do next."""

    attempt: int | None = None
    """Work at this attempt."""
    num_nodes: int = 0
    """So many nodes do, from the first on; the others wait."""
    exit_code: int = 0
    """Or end with this."""


class Channel:
    """One node's end."""

    def __init__(self, store: Any, address: str, port: int, place: JobPlace, timeout_seconds: float) -> None:
        self._store = store
        self.address = address
        self.port = port
        self.place = place
        self.timeout_seconds = timeout_seconds
        self._turn = 0

    def arrive(self) -> None:
        """Say that this node is there."""
        self._store.set(f"arrived/{self.place.node}", socket.gethostname())

    def missing(self) -> list[int]:
        """On the first node: those that have not arrived."""
        return [node for node in range(self.place.num_nodes) if not self._store.check([f"arrived/{node}"])]

    def names(self, nodes: Sequence[int]) -> list[str]:
        """Of any nodes of the job."""
        names = node_names(self.place)
        return [names[node] for node in nodes]

    def hosts(self, num_nodes: int) -> list[str]:
        """The names of the first nodes, which have arrived."""
        return [self._store.get(f"arrived/{node}").decode() for node in range(num_nodes)]

    def direct(self, directive: Directive) -> None:
        """On the first node: say what comes next."""
        self._store.set(f"directive/{self._turn}", json.dumps(asdict(directive)))
        self._turn += 1

    def next_directive(self, timeout_seconds: float | None) -> Directive:
        """On the others: wait for what the first node says.

        Args:
            timeout_seconds: None: as long as the first node is there.

        Raises:
            an error of the store's: it says nothing, or is gone.
        """
        key = f"directive/{self._turn}"
        if timeout_seconds is not None:
            self._store.wait([key], timedelta(seconds=timeout_seconds))
        while not self._store.check([key]):
            time.sleep(_IDLE_SECONDS)
        self._turn += 1
        return Directive(**json.loads(self._store.get(key)))

    def say_failed(self, attempt: int) -> None:
        """An attempt has failed here: all others are to end theirs."""
        self._store.set(f"failed/{attempt}", socket.gethostname())

    def has_failed(self, attempt: int) -> bool:
        """Whether any node has said so. Raises an error of the store's if the first node is gone."""
        return bool(self._store.check([f"failed/{attempt}"]))

    def say_ended(self, attempt: int | str) -> None:
        """All that this node had to write about an attempt is written."""
        self._store.set(f"ended/{attempt}/{self.place.node}", "")

    def wait_until_ended(self, attempt: int | str, num_nodes: int, patience: Callable[[], float]) -> list[int]:
        """On the first node: until the others of ``num_nodes`` have said so.

        Args:
            attempt: that has ended.
            num_nodes: that were to take part.
            patience: how long they may take, in seconds; asked again and again.

        Returns:
            Those that have not.
        """
        began = time.monotonic()
        others = list(range(1, num_nodes))
        while others := [node for node in others if not self._store.check([f"ended/{attempt}/{node}"])]:
            if time.monotonic() - began > patience():
                break
            time.sleep(_POLL_SECONDS)
        return others

    def another(self) -> Channel:
        """A connection of its own, for another thread."""
        store = _connect(self.address, self.port, _ANSWER)
        return Channel(store, self.address, self.port, self.place, self.timeout_seconds)


def open_channel(place: JobPlace, interface: str | None, timeout_seconds: float, folder: Path) -> Channel:
    """On the first node: bind a free port, and leave its address in ``folder``.

    Raises:
        RunError: there is no such interface, no way to another node, or no room for the address.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # made in C++

    address = _own_address(place, interface)
    store = TCPStore(address, 0, None, True, timeout=_ANSWER, wait_for_workers=False, multi_tenant=True)
    with recording(folder):
        write_json(
            address_file(folder, place.job_id, place.turn),
            {"address": address, "port": store.port, "host": socket.gethostname()},
        )
    return Channel(store, address, store.port, place, timeout_seconds)


def join(place: JobPlace, timeout_seconds: float, folder: Path) -> Channel:
    """On the others: wait for the first node's address, and connect.

    Raises:
        RunError: the first node has not come, or cannot be reached; says so to it, too.
    """
    deadline = time.monotonic() + timeout_seconds
    file, names = address_file(folder, place.job_id, place.turn), node_names(place)
    while not file.exists():
        if time.monotonic() > deadline:
            problem = (
                f"node(s) that did not join the run: {names[0]} (1 of {place.num_nodes}, the first) within "
                f"{timeout_seconds:g} s: {why_silent(names[0])}"
            )
            with suppress(OSError):  # for the batch file, which outlives this process
                first_node_problem(folder, place.job_id, place.turn).write_text(f"{problem}\n", encoding="utf-8")
            raise RunError(problem)
        time.sleep(_POLL_SECONDS)
    found = read_json(file)
    address, port = str(found["address"]), int(found["port"])
    try:
        store = _connect(address, port, timedelta(seconds=max(1.0, deadline - time.monotonic())))
    except Exception as error:  # torch's DistNetworkError and DistStoreError
        reason = f"it cannot reach {names[0]} at {address} port {port} ({_first_line(error)}); see cluster.interface"
        complaint_file(folder, place.job_id, place.turn, place.node).write_text(reason, encoding="utf-8")
        raise RunError(f"{names[place.node]}: {reason}") from error
    return Channel(store, address, port, place, timeout_seconds)


def _connect(address: str, port: int, timeout: timedelta) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # made in C++

    return TCPStore(address, port, None, False, timeout=timeout, wait_for_workers=False)


def _own_address(place: JobPlace, interface: str | None) -> str:
    if interface is not None:
        return network.address_of(interface)
    if place.num_nodes == 1:
        return "127.0.0.1"
    other = node_names(place)[1]
    try:
        return network.address_towards(slurm_address(other))
    except OSError as error:
        raise RunError(
            f"{socket.gethostname()} knows no way to {other} ({error}): name the network interface that the nodes "
            "share with cluster.interface."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

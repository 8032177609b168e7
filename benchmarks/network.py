"""Two hosts on one machine: network namespaces joined by a rate-limited link. Needs root, and Debian's iproute2.

What is made is removed again, after a failure too; nothing of the machine's own network is touched. TCP's congestion
control is that of most clusters, Linux' default, whatever this machine has: it decides how full a link gets.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["INTERFACE", "Host", "bytes_sent_here", "two_hosts", "why_not"]

INTERFACE = "link0"
"""The link's name on both hosts."""
_CONGESTION_CONTROL = "cubic"
_NETWORK = "10.77.0.0/24"
_AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


@dataclass(frozen=True)
class Host:
    """One of the two."""

    namespace: str
    address: str

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start this Python with ``arguments`` there."""
        enter = ["nsenter", f"--net=/var/run/netns/{self.namespace}"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*enter, sys.executable, *arguments], env=environment)


def why_not() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: iproute2, util-linux)"
    if _CONGESTION_CONTROL not in _AVAILABLE.read_text().split():
        return f"the kernel has no {_CONGESTION_CONTROL}, TCP's congestion control here (modprobe tcp_cubic)"
    return None


@contextmanager
def two_hosts(rate: str) -> Iterator[tuple[Host, Host]]:
    """Two hosts, each of which sends at ``rate`` at most, in tc's words, such as ``1gbit``."""
    hosts = tuple(Host(f"tminus-{os.getpid()}-{number}", f"10.77.0.{number + 1}") for number in range(2))
    ends = [f"tm{os.getpid() % 100000}e{number}" for number in range(2)]
    try:
        for host in hosts:
            _do(f"ip netns add {host.namespace}")
        _do(f"ip link add {ends[0]} type veth peer name {ends[1]}")
        for host, end in zip(hosts, ends, strict=True):
            inside = f"ip -n {host.namespace}"
            _do(f"ip link set {end} netns {host.namespace}")
            _do(f"{inside} link set {end} name {INTERFACE}")
            _do(f"{inside} addr add {host.address}/24 dev {INTERFACE}")
            _do(f"{inside} link set lo up")
            _do(f"{inside} link set {INTERFACE} up")
            # By routes, to the other host and within this one: a namespace may not choose another than the machine's.
            for there in (_NETWORK, f"local {host.address} table local"):
                way = f"dev {INTERFACE} src {host.address} congctl {_CONGESTION_CONTROL}"
                _do(f"{inside} route replace {there} {way}")
            _do(f"tc -n {host.namespace} qdisc add dev {INTERFACE} root tbf rate {rate} burst 256kb latency 200ms")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:  # takes the link with it
            _do(f"ip netns del {host.namespace}", check=False)
        _do(f"ip link del {ends[0]}", check=False)


def bytes_sent_here() -> int:
    """What this process' host has sent over the link so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == INTERFACE:
            return int(counters.split()[8])
    raise RuntimeError(f"there is no {INTERFACE} here")


def _do(command: str, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=not check)

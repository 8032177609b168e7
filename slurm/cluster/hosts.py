"""The cluster's hosts: namespaces that live as long as their first process, and the network between them.

The head is one set of namespaces (network, host name, mounts, processes); each node is another, nested in the head's
process namespace. So the kernel itself removes everything, links, mounts and processes, when the head's first process
is killed. The bridge is inside the head: the machine's own network is never touched.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .configuration import HEAD, HEAD_ADDRESS, Options, Places
from .errors import ClusterError, RequestError
from .processes import daemon_environment, do, end

__all__ = ["add_node", "has_link", "in_host", "is_alive", "remove_node", "set_link", "start_head"]

_TIMEOUT_SECONDS = 10.0
_BRIDGE = "switch"
_INTERFACE = "eth0"
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")
# Where /proc is still the machine's, a process reads there its number on the machine.
_INIT = """
set -e
read -r pid _ < /proc/self/stat
hostname "$1"
ip link set lo up
{mounts}
echo "$pid" > "$2.new"
mv "$2.new" "$2"
while :; do sleep infinity & wait || :; done  # bash also reaps what others leave to the first process
"""
_HEAD_MOUNTS = 'mount --bind "$3" /etc/hosts'
_NODE_MOUNTS = "mount -t proc proc /proc; mount -t tmpfs tmpfs /dev/shm"


def start_head(places: Places) -> None:
    """The host of the controller, with the bridge."""
    _start_host(places, HEAD, [], _HEAD_MOUNTS)
    commands = [
        f"link add {_BRIDGE} type bridge",
        f"addr add {HEAD_ADDRESS}/24 dev {_BRIDGE}",
        f"link set {_BRIDGE} up",
    ]
    _ip(places, HEAD, commands)


def add_node(places: Places, options: Options, node: str) -> None:
    """A node's host, and its link to the bridge."""
    enter = ["nsenter", "--target", str(_first_process(places, HEAD)), "--pid", "--mount", "--"]
    _start_host(places, node, enter, _NODE_MOUNTS)
    port = _port(node)
    peer = f"peer name {_INTERFACE} netns {_first_process(places, node)}"
    commands = [f"link add {port} type veth {peer}", f"link set {port} master {_BRIDGE} up"]
    _ip(places, HEAD, commands)
    _ip(places, node, [f"addr add {options.address(node)}/24 dev {_INTERFACE}", f"link set {_INTERFACE} up"])
    if options.rate is not None:
        for host, device in ((HEAD, port), (node, _INTERFACE)):
            shape = f"tc qdisc add dev {device} root tbf rate {options.rate} burst 256kb latency 200ms"
            do(in_host(places, host, shape.split()))


def remove_node(places: Places, node: str) -> None:
    """As if its power went: the link first, so that no connection is closed, then all of its processes."""
    set_link(places, node, up=False)
    end([_first_process(places, node)])
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while is_alive(places, node) and time.monotonic() < deadline:
        time.sleep(0.02)
    with suppress(ClusterError):  # its other end went with the node
        _ip(places, HEAD, [f"link del {_port(node)}"])


def set_link(places: Places, node: str, *, up: bool) -> None:
    """Plug a node's cable in or out, at the switch."""
    _ip(places, HEAD, [f"link set {_port(node)} {'up' if up else 'down'}"])


def has_link(places: Places, node: str) -> bool:
    """Whether a node's cable is plugged in."""
    shown = do(in_host(places, HEAD, ["ip", "-o", "link", "show", _port(node)]))
    return "state DOWN" not in shown


def in_host(places: Places, host: str, command: Sequence[str], *, folder: str = "/", inside: bool = False) -> list[str]:
    """The words that run a command on a host.

    Args:
        places: the cluster's.
        host: head or a node.
        command: the words.
        folder: to run in.
        inside: whether the process is to be one of the host's own, numbered by it and ended with it. Otherwise it
            replaces the program that is run, so that signals reach it.
    """
    namespaces = f"/proc/{_first_process(places, host)}/ns"
    words = ["nsenter", f"--net={namespaces}/net", f"--uts={namespaces}/uts", f"--mount={namespaces}/mnt"]
    if inside or host != HEAD:  # a node's /proc knows its own processes alone
        words.append(f"--pid={namespaces}/pid")
    return [*words, f"--wdns={folder}", "--", *command]


def is_alive(places: Places, host: str) -> bool:
    """Whether a host's first process is there."""
    try:
        _first_process(places, host)
    except RequestError:
        return False
    return True


def _start_host(places: Places, name: str, enter: list[str], mounts: str) -> None:
    pid = places.pid(name)
    pid.unlink(missing_ok=True)
    words = [*enter, "unshare", *_NAMESPACES, "--fork", "--kill-child", "--"]
    script = ["bash", "-c", _INIT.format(mounts=mounts), "host", name, str(pid), str(places.hosts)]
    with places.log(f"host-{name}").open("ab") as log:
        process = subprocess.Popen(
            [*words, *script],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=daemon_environment(places.directory),
        )
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not pid.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ClusterError(f"the host {name} has not come up: {places.log(f'host-{name}').read_text().strip()}")
        time.sleep(0.01)


def _first_process(places: Places, host: str) -> int:
    """The host's, after a check that it is still that one."""
    try:
        pid = int(places.pid(host).read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        words = []
    if str(places.pid(host)).encode() not in words:
        raise RequestError(f"the host {host} is not there (power-on NODE brings a node back)")
    return pid


def _port(node: str) -> str:
    """The switch's end of a node's cable."""
    return f"to-{node}"


def _ip(places: Places, host: str, commands: Sequence[str]) -> None:
    namespace = f"/proc/{_first_process(places, host)}/ns/net"
    do(["nsenter", f"--net={namespace}", "--", "ip", "-batch", "-"], text="\n".join([*commands, ""]))

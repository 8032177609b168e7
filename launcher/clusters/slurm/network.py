"""The address under which the other nodes of a job reach this one, and the interface that has it.

This node's name is not resolved: it often stands for 127.0.1.1, or for another network.
"""

from __future__ import annotations

import fcntl
import socket
import struct

from launcher.errors import RunError

__all__ = ["address_of", "address_towards", "interface_of"]

_SIOCGIFADDR = 0x8915
"""ioctl(2), see netdevice(7): an interface's IPv4 address."""
_ANY_PORT = 9


def address_of(interface: str) -> str:
    """An interface's IPv4 address.

    Raises:
        RunError: there is no such interface, or it has none; with those that have.
    """
    address = _address(interface)
    if address is None:
        there = ", ".join(f"{name} ({found})" for _, name in socket.if_nameindex() if (found := _address(name)))
        raise RunError(
            f"cluster.interface={interface}: {socket.gethostname()} has no such interface with an IPv4 address. "
            f"There are: {there or 'none'}."
        )
    return address


def address_towards(other: str) -> str:
    """This node's address on the route to ``other``, an address or a name. Raises OSError if there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, _ANY_PORT))  # sends nothing
        address: str = probe.getsockname()[0]
    return address


def interface_of(address: str) -> str | None:
    """The name of the interface that has an address."""
    return next((name for _, name in socket.if_nameindex() if _address(name) == address), None)


def _address(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])

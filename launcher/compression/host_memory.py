"""Memory that the ranks of one host have in common.

It has no name (memfd): a killed rank leaves nothing behind, and no limit of /dev/shm's applies. The others open it
through /proc, which they may as the same user in the same namespace of processes.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from launcher.compression.links import Team

__all__ = ["share_memory"]

_NAME = "tminus-gradients"
"""As /proc shows it."""
_NONCE_BYTES = 16


def share_memory(team: Team, nbytes: int) -> list[Tensor] | None:
    """As many bytes of each place of this host, as zeros; None, for all ranks of the team, if one cannot have them.

    Pages that nobody writes to take no memory.
    """
    with ExitStack() as closing:
        offers: list[_Offer | None] = team.gather(_offer(nbytes, closing))
        memory = _taken([offers[peer] for peer in team.grid.ranks[team.grid.host]], nbytes)
        all_have = all(team.gather(memory is not None))
    return memory if all_have else None


class _Offer(NamedTuple):
    process: int
    descriptor: int
    nonce: bytes
    """Behind the memory: what another process, or another namespace's, has under these numbers is told from it."""


def _offer(nbytes: int, closing: ExitStack) -> _Offer | None:
    """Memory of this rank's, open until ``closing``; None if there is none."""
    if not hasattr(os, "memfd_create"):  # Linux alone
        return None
    nonce = secrets.token_bytes(_NONCE_BYTES)
    try:
        descriptor = os.memfd_create(_NAME)
        closing.callback(os.close, descriptor)
        os.truncate(descriptor, nbytes)
        os.pwrite(descriptor, nonce, nbytes)
    except (OSError, OverflowError):
        return None
    return _Offer(os.getpid(), descriptor, nonce)


def _taken(offers: Sequence[_Offer | None], nbytes: int) -> list[Tensor] | None:
    """What is offered, this rank's own too; None if one is missing or is not what was offered."""
    memory = []
    for offer in offers:
        try:
            if offer is None:
                return None
            path = f"/proc/{offer.process}/fd/{offer.descriptor}"
            if not os.readlink(path).startswith(f"/memfd:{_NAME}"):  # opening whatever else it is may do something
                return None
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.pread(descriptor, _NONCE_BYTES, nbytes) != offer.nonce:
                    return None
                memory.append(torch.frombuffer(mmap.mmap(descriptor, nbytes), dtype=torch.uint8))
            finally:
                os.close(descriptor)
        except (OSError, ValueError, MemoryError):  # not ours to open, or too short, or no room for so many addresses
            return None
    return memory

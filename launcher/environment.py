"""The one place where environment variables are read, from a mapping that is passed in."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Ranks", "is_torchrun_worker", "thread_limit"]


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the workers."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    host: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ranks:
        """From the variables that torch's elastic agent sets in each worker."""
        return cls(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment["LOCAL_RANK"]),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
            node_rank=int(environment.get("GROUP_RANK", "0")),
            host=socket.gethostname(),
        )


def is_torchrun_worker(environment: Mapping[str, str]) -> bool:
    """Whether torchrun (or something that sets the same variables) has started this process as a worker."""
    return all(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


def thread_limit(environment: Mapping[str, str], local_world_size: int) -> int | None:
    """Threads for one worker's CPU kernels: its share of the cores this process may use.

    None where the user has decided with OMP_NUM_THREADS; torchrun sets that to 1 itself.
    """
    if "OMP_NUM_THREADS" in environment:
        return None
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)

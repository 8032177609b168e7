"""The one place where environment variables are read, from a mapping that is passed in."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "JobPlace",
    "Ranks",
    "as_first_rank",
    "is_torchrun_worker",
    "outside_of_jobs",
    "slurm_job_id",
    "thread_limit",
]


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


def as_first_rank(environment: Mapping[str, str], world_size: int) -> dict[str, str]:
    """The environment with what a user's code may ask for in a worker, as in the first one; what is there stays."""
    first = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    return {**first, **environment}


def thread_limit(environment: Mapping[str, str], local_world_size: int) -> int | None:
    """Threads for one worker's CPU kernels: its share of the cores this process may use.

    None where the user has decided with OMP_NUM_THREADS; torchrun sets that to 1 itself.
    """
    if "OMP_NUM_THREADS" in environment:
        return None
    cores = len(os.sched_getaffinity(0))
    if "SLURM_CPUS_PER_TASK" in environment:  # on clusters that do not bind tasks to their cores
        cores = min(cores, int(environment["SLURM_CPUS_PER_TASK"]))
    return max(1, cores // local_world_size)


@dataclass(frozen=True)
class JobPlace:
    """Where this process stands in a job of SLURM with one task per node."""

    job_id: str
    """As squeue shows it: of an element of an array, ``ARRAY_INDEX``."""
    node: int
    """From 0, in SLURM's order."""
    num_nodes: int
    node_list: str
    """In SLURM's short form."""
    turn: int
    """How often SLURM has started the job again."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> JobPlace:
        """From the variables that SLURM sets in each task."""
        job_id = slurm_job_id(environment)
        assert job_id is not None
        return cls(
            job_id=job_id,
            node=int(environment["SLURM_NODEID"]),
            num_nodes=int(environment["SLURM_NNODES"]),
            node_list=environment["SLURM_JOB_NODELIST"],
            turn=int(environment.get("SLURM_RESTART_COUNT", "0")),
        )


def slurm_job_id(environment: Mapping[str, str]) -> str | None:
    """The job that this process belongs to, as squeue shows it; None outside of jobs."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID")


def outside_of_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what says that this process is in a job; which cluster to talk to stays."""
    of_jobs = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "PMI_", "PMIX_")
    return {name: value for name, value in environment.items() if name == "SLURM_CONF" or not name.startswith(of_jobs)}

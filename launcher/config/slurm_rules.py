"""What must hold of a job that is to be sent to SLURM, beyond what holds of every run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from launcher.config.schema import ClusterConfig, Device, RunConfig

__all__ = ["slurm_problems", "slurm_warnings"]

_OWN = {
    "nodes": "cluster.nodes",
    "ntasks-per-node": "cluster.processes_per_node (there is one task per node, which starts the workers)",
    "ntasks": "cluster.nodes (there is one task per node)",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "time": "cluster.time_limit_min",
    "gpus-per-node": "cluster.gpus_per_node",
    "cpus-per-task": "cluster.cpus_per_task",
    "mem": "cluster.memory_gib",
    "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue=false",
    "signal": "cluster.signal_lead_seconds",
    "array": "launch -m and cluster.max_parallel_jobs",
    "job-name": "name",
    "chdir": "nothing: the job works in the folder that it is submitted from",
    "output": "nothing: logs are in the run's directory",
    "error": "nothing: logs are in the run's directory",
    "open-mode": "nothing: logs are in the run's directory",
    "wrap": "nothing: what the job runs is T-minus's own",
    "parsable": "nothing: T-minus reads what sbatch prints",
    "wait": "cluster.wait",
}
"""Options of sbatch that have a field of their own, or are not to be touched."""
_LONGEST_LEAD = 65535
"""Seconds; of sbatch --signal."""


def slurm_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with a configuration that is for SLURM."""
    cluster = config.cluster
    yield from _numbers(cluster)
    yield from _verbatim(cluster)
    if config.device is Device.cuda and not cluster.gpus_per_node:
        yield (
            f"device=cuda with cluster.gpus_per_node={'null' if cluster.gpus_per_node is None else 0}: the job would "
            "have no GPU. Say how many each node is to have, or use device=cpu."
        )
    if not config.checkpoint.enabled and cluster.requeue:
        yield (
            "checkpoint.enabled=false with cluster.requeue=true: each turn of the job would begin anew. "
            "Use cluster.requeue=false, or checkpoint=standard."
        )
    for name, value in cluster.environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            yield f"cluster.environment: {name!r} cannot name a variable: use letters, digits and '_'."
        if value is not None and not isinstance(value, (str, int, float, bool)):
            yield f"cluster.environment.{name}={value!r} is not one value: write the text that it is to be."


def _numbers(cluster: ClusterConfig) -> Iterator[str]:
    least = {
        "time_limit_min": 1,
        "gpus_per_node": 0,
        "cpus_per_task": 1,
        "memory_gib": 0,
        "signal_lead_seconds": 1,
        "max_parallel_jobs": 1,
        "rendezvous_timeout_seconds": 1,
    }
    for name, smallest in least.items():
        value = getattr(cluster, name)
        if value is not None and not value >= smallest:
            yield f"cluster.{name}={value} is too small: it must be at least {smallest}."
    if not cluster.snapshot_limit_mib > 0:
        limit = cluster.snapshot_limit_mib
        yield f"cluster.snapshot_limit_mib={limit} must be greater than 0; cluster.snapshot=false copies nothing."
    lead = cluster.signal_lead_seconds
    if lead > _LONGEST_LEAD:
        yield f"cluster.signal_lead_seconds={lead} is too large: SLURM knows at most {_LONGEST_LEAD}."
    elif cluster.time_limit_min >= 1 and lead >= 60 * cluster.time_limit_min:
        yield (
            f"cluster.signal_lead_seconds={lead} is not below cluster.time_limit_min={cluster.time_limit_min} "
            f"({60 * cluster.time_limit_min} s): the job would be asked to stop when it starts. Use a smaller lead, "
            f"such as {15 * cluster.time_limit_min}, or a longer limit."
        )


def _verbatim(cluster: ClusterConfig) -> Iterator[str]:
    for name, value in cluster.sbatch.items():
        option = str(name).lstrip("-").replace("_", "-")
        if option in _OWN:
            own, _, why = _OWN[option].partition(": ")
            yield f"cluster.sbatch.{name}: " + (
                f"leave it out: {why}." if own == "nothing" else f"use {_OWN[option]} instead."
            )
        elif not re.fullmatch(r"[a-z][a-z0-9-]*", option):
            yield f"cluster.sbatch: {name!r} is not the name of an option of sbatch, such as constraint or exclude."
        elif value is not None and not isinstance(value, (str, int, float, bool)):
            yield f"cluster.sbatch.{name}={value!r} is not one value: write it as sbatch takes it, such as a,b,c."


def slurm_warnings(config: RunConfig) -> Iterator[str]:
    """What works, but hardly as meant."""
    cluster = config.cluster
    if not cluster.gpus_per_node:
        yield "cluster.gpus_per_node is not set: the job asks for no GPU and trains on CPUs."
    elif config.device is Device.cuda and (cluster.processes_per_node or 0) < cluster.gpus_per_node:
        yield (
            f"cluster.processes_per_node={cluster.processes_per_node} is below "
            f"cluster.gpus_per_node={cluster.gpus_per_node}: the other GPUs of each node stay idle."
        )
    if cluster.container_image is not None and cluster.python is None:
        yield (
            "cluster.container_image without cluster.python: the container is to have Python, torch and T-minus at the "
            "same path as here. If it has not: cluster.python=python3."
        )

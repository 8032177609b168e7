"""Fill in what depends on the machine, then check everything: the last stop before a process starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.config.rules import check
from launcher.config.schema import Device, RunConfig
from launcher.config.sizes import node_range

__all__ = ["Machine", "prepare"]

_CPU_WORKERS = 2


@dataclass(frozen=True)
class Machine:
    """Processes that exist already (torchrun), which a configuration must take as they are."""

    nodes: int
    processes_per_node: int


def prepare(config: RunConfig, machine: Machine | None = None) -> list[str]:
    """Fill in ``device`` and the number of processes in place, check all, return warnings.

    Raises:
        ConfigurationError, JobError: the run cannot work as configured.
    """
    num_gpus = 0
    if config.cluster.kind == "slurm":
        num_gpus = max(0, config.cluster.gpus_per_node or 0)  # of the job's machines; this one may have none
    elif config.device is not Device.cpu:
        num_gpus = _num_gpus()
    if config.device is Device.auto:
        config.device = Device.cuda if num_gpus else Device.cpu
    if machine is not None:
        config.cluster.kind = "torchrun"
        config.cluster.nodes = machine.nodes
        config.cluster.processes_per_node = machine.processes_per_node
    elif config.cluster.processes_per_node is None:
        config.cluster.processes_per_node = num_gpus or _CPU_WORKERS
    if config.train.init_from is not None:
        config.train.init_from = str(Path(config.train.init_from).absolute())  # a run may be resumed from elsewhere
    warnings = check(config, num_gpus)
    nodes = node_range(config)
    config.cluster.nodes = str(nodes) if nodes.is_elastic else nodes.most  # written in one way
    from launcher.config.targets import check_targets  # imports the user's code, and torch
    from launcher.config.trial import refuse_streams_without_state

    check_targets(config)
    refuse_streams_without_state(config)
    return warnings


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0

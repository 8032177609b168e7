"""Whether as many machines as there may be can share a run."""

from __future__ import annotations

import math
from collections.abc import Iterator

from launcher.config.schema import RunConfig
from launcher.config.sizes import NodeRange, misfits, node_range, usable_nodes, world_size
from launcher.errors import ConfigurationError

__all__ = ["node_problems", "node_warnings"]

_NEAR = 4
"""Nobody wants a batch of so many times what was asked for."""


def node_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with ``cluster.nodes`` for this run."""
    try:
        nodes = node_range(config)
    except ConfigurationError as error:
        yield str(error)
        return
    if config.cluster.kind == "local" and nodes.most > 1:
        instead = "cluster.nodes=1, or cluster=slurm" if nodes.is_elastic else "cluster.nodes=1"
        yield f"cluster.nodes={nodes}, but cluster=local is this one machine: use {instead}."
    if (config.cluster.processes_per_node or 0) < 1:
        return  # said of that itself
    if not nodes.is_elastic:
        yield from map(str, misfits(config, world_size(config)))
        return
    train = config.train
    if train.global_batch_size is None and train.accumulation_steps is not None:
        most = train.accumulation_steps * (train.micro_batch_size or 1) * world_size(config)
        yield (
            f"train.accumulation_steps={train.accumulation_steps} with cluster.nodes={nodes}: the global batch would "
            "change with the number of machines. Use train.accumulation_steps=null, and say what it is: "
            f"train.global_batch_size={most} is that of {nodes.most} machines."
        )
    if why := _reasons(config, nodes.least):
        fitting = ", ".join(str(count) for count in nodes.counts if usable_nodes(config, count) == count)
        yield (
            f"cluster.nodes={nodes}: {nodes.least} machine(s), the fewest, cannot share the run: {why}. "
            f"Of this range fit: {fitting or 'none'}.{_batch_for_all(config, nodes)}"
        )


def node_warnings(config: RunConfig) -> Iterator[str]:
    """Numbers of machines in the range that cannot all train."""
    nodes = node_range(config)
    idle = {count: usable for count in nodes.counts if (usable := usable_nodes(config, count)) < count}
    if idle:
        first = next(iter(idle))
        cases = ", ".join(f"of {count} machines {usable}" for count, usable in idle.items())
        yield (
            f"cluster.nodes={nodes}: {cases} will train, and the others stay idle: with {first}, "
            f"{_reasons(config, first)}.{_batch_for_all(config, nodes)}"
        )


def _reasons(config: RunConfig, num_nodes: int) -> str:
    """Why so many machines cannot share the run; empty if they can."""
    return ", and ".join(misfit.reason for misfit in misfits(config, world_size(config, num_nodes)))


def _batch_for_all(config: RunConfig, nodes: NodeRange) -> str:
    """A global batch near the one that was asked for which divides over any number of machines in the range."""
    train = config.train
    asked, portion = train.global_batch_size or 0, math.lcm(*nodes.counts) * world_size(config, 1)
    portion *= max(1, train.micro_batch_size or 1)
    larger = -(-asked // portion) * portion
    is_near = asked % portion != 0 and larger <= _NEAR * asked
    return f" train.global_batch_size={larger} divides over any of them." if is_near else ""

"""Numbers that follow from a configuration: machines, workers, shards, micro-batches.

A job of SLURM may have as many machines as a range allows. Its global batch stays what it is: accumulation follows the
machines that are there. Where a number of them does not fit, the run takes the largest that does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from launcher.config.schema import RunConfig, Strategy
from launcher.errors import ConfigurationError

__all__ = [
    "Misfit",
    "NodeRange",
    "accumulation_steps",
    "misfits",
    "node_range",
    "shard_ranks",
    "usable_nodes",
    "world_size",
]


@dataclass(frozen=True)
class NodeRange:
    """How many machines a run may have."""

    least: int
    most: int

    @classmethod
    def parse(cls, value: int | str) -> NodeRange:
        """From ``cluster.nodes``: a number, or ``MIN-MAX``.

        Raises:
            ConfigurationError: it is neither.
        """
        found = re.fullmatch(r"(-?[0-9]+)(?:-([0-9]+))?", str(value))
        if found is None:
            raise ConfigurationError(
                f"cluster.nodes={value} is not a number of machines: give one, such as 2, or a range, such as 2-4."
            )
        nodes = cls(int(found[1]), int(found[2] or found[1]))
        if nodes.least < 1:
            raise ConfigurationError(f"cluster.nodes={value} is too small: a run has at least 1 machine.")
        if nodes.most < nodes.least:
            raise ConfigurationError(
                f"cluster.nodes={value} ends before it begins: the smaller number comes first, "
                f"{nodes.most}-{nodes.least}."
            )
        return nodes

    @property
    def is_elastic(self) -> bool:
        """Whether there is a choice."""
        return self.most > self.least

    @property
    def counts(self) -> range:
        """Every number of machines that the run may have."""
        return range(self.least, self.most + 1)

    def __str__(self) -> str:
        return f"{self.least}-{self.most}" if self.is_elastic else str(self.most)


def node_range(config: RunConfig) -> NodeRange:
    """How many machines the run may have; raises ConfigurationError if that is not said."""
    return NodeRange.parse(config.cluster.nodes)


def world_size(config: RunConfig, num_nodes: int | None = None) -> int:
    """Workers in all; the cluster's defaults must have been filled in.

    Args:
        config: of the run.
        num_nodes: machines; None: as many as the run may have.
    """
    assert config.cluster.processes_per_node is not None
    return (node_range(config).most if num_nodes is None else num_nodes) * config.cluster.processes_per_node


def shard_ranks(config: RunConfig) -> int:
    """hsdp: the ranks that share one replica."""
    assert config.cluster.processes_per_node is not None
    return config.parallel.shard_size or config.cluster.processes_per_node


def accumulation_steps(config: RunConfig, num_workers: int) -> int:
    """Micro-batches per worker and optimizer step."""
    train = config.train
    if train.accumulation_steps is not None:
        return train.accumulation_steps
    assert train.global_batch_size is not None
    assert train.micro_batch_size is not None
    return train.global_batch_size // (train.micro_batch_size * num_workers)


@dataclass(frozen=True)
class Misfit:
    """Why so many workers cannot share a run."""

    reason: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.reason}. {self.way_out}"


def misfits(config: RunConfig, num_workers: int) -> Iterator[Misfit]:
    """What keeps so many workers from sharing the run; nothing if they can."""
    train = config.train
    if train.accumulation_steps is None and train.micro_batch_size is not None and (train.global_batch_size or 0) > 0:
        portion = max(1, train.micro_batch_size) * num_workers
        assert train.global_batch_size is not None
        if train.global_batch_size % portion:
            below = train.global_batch_size // portion * portion
            choices = " or ".join(str(size) for size in (below, below + portion) if size > 0)
            yield Misfit(
                f"train.global_batch_size={train.global_batch_size} does not divide into micro-batches of "
                f"{train.micro_batch_size} on {num_workers} worker(s): it must be a multiple of {portion}",
                f"Use {choices}, or another train.micro_batch_size or number of workers.",
            )
    shard_size = shard_ranks(config) if config.parallel.strategy is Strategy.hsdp else 1
    if shard_size > 0 and num_workers % shard_size:
        valid = ", ".join(str(size) for size in range(1, num_workers + 1) if num_workers % size == 0)
        yield Misfit(
            f"parallel.shard_size={shard_size} does not divide the {num_workers} worker(s)", f"Valid: {valid}."
        )


def usable_nodes(config: RunConfig, num_nodes: int) -> int:
    """The most of so many machines that can share the run; 0 if no number of them can."""
    counts = range(num_nodes, 0, -1)
    return next((count for count in counts if not any(misfits(config, world_size(config, count)))), 0)

"""From a job's model to one that is laid out over the ranks: the order of things.

1. build: in full for ddp; for the sharding strategies without ever being held in full
2. check what sharding cannot do
3. activation checkpointing, around each block
4. torch.compile: the whole model (ddp), or each block (sharded), inside the collectives
5. wrap: DistributedDataParallel, or ``fully_shard`` on each block and on the rest
6. materialise: each rank keeps its shards of the initial weights
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from launcher.compression import OverflowProbe, Wire, attach_replicated, preferred_bucket_mib
from launcher.config.schema import Codec, CompressionConfig, ParallelConfig, Strategy, Wrap
from launcher.errors import JobError
from launcher.job import Job
from launcher.parallel.blocks import checked_blocks, checked_model, checkpoint_activations
from launcher.parallel.sharding import build_sharded

__all__ = ["Layout", "ParallelModel", "parallelize"]


@dataclass(frozen=True)
class Layout:
    """Who computes, on what, in which type."""

    device: torch.device
    dtype: torch.dtype
    """Of the forward and backward pass."""
    world_size: int
    shard_size: int
    """Ranks that share one copy of the master weights: 1 under ddp."""
    compile: bool
    probe: bool
    """Whether to look at the gradients before they cross the wire."""
    compression: CompressionConfig
    """How gradients cross the wire."""


@dataclass(frozen=True)
class ParallelModel:
    """A model as the ranks see it."""

    module: nn.Module
    """The user's model, with the parameters that are trained: DTensors where they are sharded."""
    training: nn.Module
    """What a training forward pass calls."""
    num_gradient_copies: int
    """How many ranks hold the same gradient after the backward pass."""
    probe: OverflowProbe | None
    wire: Wire
    """What the gradients cross."""
    averages: bool = True
    """Whether the ranks' gradients are averaged on their way, or summed."""

    @contextmanager
    def synchronising(self, last: bool) -> Iterator[None]:
        """Around forward and backward: gradients cross the wire in the last micro-batch only."""
        context: AbstractContextManager[None] = nullcontext()
        if isinstance(self.training, FSDPModule):
            self.training.set_requires_gradient_sync(last)
            self.training.set_is_last_backward(last)
        elif isinstance(self.training, DistributedDataParallel) and not last:
            context = self.training.no_sync()
        with context:
            yield

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model to call for validation: evaluation mode, no gradients. Sharded, each call is collective."""
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train(was_training)
            for part in self.module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def missing_gradients(self) -> list[str]:
        """Trainable parameters without a gradient, by name."""
        named = self.module.named_parameters()
        return [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]

    def check_gradients(self) -> None:
        """After the first backward pass: raises JobError on gradients that are sparse, or that DDP has waited for."""
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                raise JobError(
                    f"{name}: its gradient is sparse ({parameter.grad.layout}), which cannot be measured and clipped "
                    "in one pass with the others: use sparse=False."
                )
        if not isinstance(self.training, DistributedDataParallel) or self.training.find_unused_parameters:
            return
        missing = self.missing_gradients()
        if missing:
            shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            raise JobError(
                f"{len(missing)} trainable parameter(s) got no gradient: {shown}. Freeze them "
                "(requires_grad_(False)), use them in the loss, or set parallel.find_unused_parameters=true."
            )


def parallelize(job: Job, config: ParallelConfig, layout: Layout) -> ParallelModel:
    """Build the job's model and lay it out. Call it under the run's seed, on all ranks.

    Raises:
        JobError: the model cannot be laid out like this.
    """
    if config.strategy is Strategy.ddp:
        return _replicated(job, config, layout)

    def prepare(model: nn.Module) -> list[nn.Module]:
        blocks = checked_blocks(job, model) if config.wrap is Wrap.blocks else []
        if config.activation_checkpointing:
            checkpoint_activations(checked_blocks(job, model))
        if layout.compile:
            for part in blocks or [model]:
                part.compile()
        return blocks

    wire, probe = Wire(layout.device), OverflowProbe(layout.device) if layout.probe else None
    model = build_sharded(job.build_model, prepare, config.strategy, layout, (wire, probe))
    replicas = layout.world_size // layout.shard_size
    return ParallelModel(model, model, num_gradient_copies=replicas, probe=probe, wire=wire)


def _replicated(job: Job, config: ParallelConfig, layout: Layout) -> ParallelModel:
    model = checked_model(job.build_model(), job).to(layout.device).train()
    if config.activation_checkpointing:
        checkpoint_activations(checked_blocks(job, model))
    if layout.compile:
        model.compile()
    wire = Wire(layout.device)
    if layout.world_size == 1:
        return ParallelModel(model, model, num_gradient_copies=1, probe=None, wire=wire)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise JobError(f"{type(job).__name__}: every parameter is frozen; there is nothing to train.")
    bucket_mib = config.bucket_mib or preferred_bucket_mib(layout.compression.codec, layout.device)
    training = DistributedDataParallel(
        model,
        device_ids=[layout.device] if layout.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=bucket_mib,
        find_unused_parameters=config.find_unused_parameters,
    )
    probe = OverflowProbe(layout.device) if layout.probe else None
    attach_replicated(training, layout.compression, wire, probe)
    averages = layout.compression.codec is not Codec.none
    return ParallelModel(model, training, layout.world_size, probe=probe, wire=wire, averages=averages)

"""From a model to a model whose gradients are averaged over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from launcher.config.schema import ParallelConfig

__all__ = ["ParallelModel", "parallelize"]


@dataclass(frozen=True)
class ParallelModel:
    """A model as the ranks see it."""

    module: nn.Module
    """The user's model, with the parameters that are trained."""
    training: nn.Module
    """What a training forward pass calls."""
    num_gradient_copies: int
    """How many ranks hold the same gradient after the backward pass."""

    def synchronising(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward: gradients cross the wire in the last micro-batch only."""
        if last or not isinstance(self.training, DistributedDataParallel):
            return nullcontext()
        return self.training.no_sync()

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model to call for validation: no gradients, evaluation mode, no collective."""
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.module
        finally:
            self.module.train(was_training)


def parallelize(model: nn.Module, config: ParallelConfig, device: torch.device, world_size: int) -> ParallelModel:
    """Lay ``model`` (on ``device``, the same weights on every rank) out over the ranks.

    The average over ranks is DDP's: each bucket is divided by ``world_size`` and summed while the
    backward pass still runs.
    """
    model.train()
    if world_size == 1:
        return ParallelModel(module=model, training=model, num_gradient_copies=1)
    training = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=config.find_unused_parameters,
    )
    return ParallelModel(module=model, training=training, num_gradient_copies=world_size)

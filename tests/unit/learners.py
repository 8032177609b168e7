"""A learner on one process, and a job whose items fall unevenly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from launcher import Job, LossOutput
from launcher.building import build_learner
from launcher.config.schema import RunConfig
from launcher.environment import Ranks
from launcher.training.batches import BatchShape
from launcher.training.step import Learner
from tests.unit.configs import good_config

__all__ = ["UnevenJob", "learner_for", "uneven_samples"]

SGD = {"_target_": "torch.optim.SGD", "lr": 1.0}


class UnevenJob(Job):
    """Squared error over the unmasked places of each sample: ``(inputs, targets, mask)``."""

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def build_dataset(self, split: str) -> Any:
        return uneven_samples(7)

    def compute_loss(self, model: nn.Module, batch: Any) -> LossOutput:
        inputs, targets, mask = batch
        error = (model(inputs).squeeze(-1).float() - targets).square() * mask
        return LossOutput(error.sum(), mask.sum(), {"error": error.detach().sum() * 2})


def uneven_samples(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Samples of five places, of which none to all count."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(5, 3, generator=generator),
            torch.randn(5, generator=generator),
            (torch.arange(5) < (3 * number) % 6).float(),
        )
        for number in range(1, count + 1)
    ]


def learner_for(job: Job | None = None, accumulation_steps: int = 1, **changes: Any) -> Learner:
    """What a worker builds, without a process group; plain SGD at rate 1 unless ``changes`` say otherwise."""
    config: RunConfig = good_config(**changes)
    if "optimizer" not in changes:
        config.optimizer = dict(SGD)
    ranks = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="here")
    shape = BatchShape(8, accumulation_steps, 1)
    return build_learner(config, job or UnevenJob(), torch.device(config.device.value), ranks, shape, steps=100)

"""A learner on one process, and a job whose items fall unevenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher import Job, LossOutput
from launcher.checkpoint import CheckpointStore
from launcher.checkpoint.saver import Saved, Saver
from launcher.checkpoint.snapshot import Snapshot
from launcher.config.schema import RunConfig, Verify
from launcher.environment import Ranks
from launcher.learner import build_learner
from launcher.training.batches import BatchShape, TrainingData
from launcher.training.progress import Best, Identity, Progress, continued, take_snapshot
from launcher.training.restoring import read
from launcher.training.step import Learner
from tests.unit.configs import good_config

__all__ = ["UnevenJob", "learner_for", "load", "save", "snapshot", "uneven_data", "uneven_samples"]

_IDENTITY = Identity("ddp", "float32", "x", 0, 0, 1)
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


def uneven_data() -> TrainingData:
    """Eight samples, all in each batch, for the only rank."""
    return TrainingData(UnevenJob(), uneven_samples(8), BatchShape(8, 1, 1), 0, seed=0)


def snapshot(learner: Learner, best: Best | None = None) -> Snapshot:
    """Of a learner on ``uneven_data``."""
    return take_snapshot(learner, uneven_data(), _IDENTITY, Progress(), best)


def save(learner: Learner, folder: Path, best: Best | None = None) -> None:
    """A checkpoint of ``snapshot``."""
    saver = Saver(CheckpointStore(folder / "checkpoints"), 0, 1, learner.device)
    saver.begin(lambda: snapshot(learner, best))
    assert isinstance(saver.settle(), Saved)


def load(learner: Learner, folder: Path, verify: Verify = Verify.full) -> tuple[Progress, list[str]]:
    """The newest checkpoint of ``save``, into a learner that was freshly built."""
    found = CheckpointStore(folder / "checkpoints").newest_valid(verify)
    assert found.checkpoint is not None
    return continued(learner, uneven_data(), _IDENTITY, read(learner, found.checkpoint, rank=0, world_size=1))


def learner_for(job: Job | None = None, accumulation_steps: int = 1, **changes: Any) -> Learner:
    """What a worker builds, without a process group; plain SGD at rate 1 unless ``changes`` say otherwise."""
    config: RunConfig = good_config(**changes)
    if "optimizer" not in changes:
        config.optimizer = dict(SGD)
    ranks = Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="here")
    shape = BatchShape(8, accumulation_steps, 1)
    return build_learner(config, job or UnevenJob(), torch.device(config.device.value), ranks, shape, steps=100)

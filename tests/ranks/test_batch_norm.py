"""Batch normalisation in 16-bit models that are sharded: computed as under ddp, with FP32 weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher import Job, LossOutput
from launcher.environment import Ranks as Place
from launcher.learner import build_learner
from launcher.training.batches import BatchShape
from launcher.training.step import train_step
from tests.ranks.processes import Ranks
from tests.unit.configs import good_config

pytestmark = pytest.mark.ranks

CPU = torch.device("cpu")
STEPS = 4


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.convolution(x)))


class Normalised(Job):
    """Normalises its FP32 inputs, then 16-bit activations: in a block, outside of one, and as a block of its own."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm1d(4), Part(), nn.BatchNorm1d(4, affine=False), Part(), nn.Flatten(), nn.Linear(12, 3),
            nn.BatchNorm1d(3),
        )  # fmt: skip

    def blocks(self, model: Any) -> Any:
        return [model[1], model[3], model[6]]

    def build_dataset(self, split: str) -> Any:
        raise NotImplementedError

    def compute_loss(self, model: nn.Module, batch: Any) -> LossOutput:
        return LossOutput((model(batch).float() - 0.5).square().sum(), len(batch))


def train(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    config = good_config(**settings, cluster__processes_per_node=2)
    config.optimizer = {"_target_": "torch.optim.SGD", "lr": 0.05}
    learner = build_learner(config, Normalised(), CPU, Place(rank, 2, rank, 2, 0, "x"), BatchShape(6, 1, 2), STEPS)
    generator = torch.Generator().manual_seed(rank)
    losses = [
        train_step(learner, [torch.randn(6, 4, 3, generator=generator)], stop=False).read().loss for _ in range(STEPS)
    ]
    with learner.model.evaluating() as model, learner.autocast():
        validation = model(torch.ones(2, 4, 3)).float().tolist()
    buffers = {name: value.dtype for name, value in learner.model.module.named_buffers() if value.is_floating_point()}
    return {"losses": losses, "validation": validation, "buffers": set(map(str, buffers.values()))}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "strategy",
    [
        {"parallel__strategy": "zero2"},
        {"parallel__strategy": "fsdp"},
        {"parallel__strategy": "fsdp", "parallel__activation_checkpointing": True},
    ],
)
def test_batch_norm_trains_as_under_ddp(pools: dict[int, Ranks], strategy: dict[str, Any], dtype: str) -> None:
    precision = {"precision__dtype": dtype, "precision__loss_scale__initial": 256.0}
    whole = pools[2].run(train, {**precision, **strategy, "parallel__strategy": "ddp"})
    sharded = pools[2].run(train, {**precision, **strategy})
    assert whole[0]["losses"][-1] < 0.8 * whole[0]["losses"][0]
    assert sharded[0]["losses"] == pytest.approx(whole[0]["losses"], rel=2e-3)
    assert torch.tensor(sharded[0]["validation"]).allclose(torch.tensor(whole[0]["validation"]), atol=2e-2)
    assert sharded[1]["buffers"] == {"torch.float32"}

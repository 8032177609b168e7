"""Who is compared: this engine, built as a worker builds it, and the same training written by hand with torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launcher.jobs.language_model import LanguageModelJob
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from launcher.config.schema import (
    Device,
    Dtype,
    LossScaleConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    Strategy,
    TrainConfig,
)
from launcher.environment import Ranks
from launcher.learner import build_learner
from launcher.training.batches import BatchShape
from launcher.training.step import Learner

__all__ = ["MAX_GRAD_NORM", "OPTIMIZER", "Batch", "HandWritten", "Setup", "random_batches"]

Batch = tuple[Tensor, Tensor]
MAX_GRAD_NORM = 1.0
OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
_INITIAL_SCALE = 1024.0


def random_batches(job: LanguageModelJob, count: int, size: int, device: str = "cpu") -> list[Batch]:
    """Micro-batches of random bytes."""
    tokens = torch.randint(256, (count, size, job.context + 1), device=device)
    return [(sample[:, :-1].contiguous(), sample[:, 1:].contiguous()) for sample in tokens]


@dataclass(frozen=True)
class Setup:
    """One training problem, for whoever solves it."""

    job: LanguageModelJob
    strategy: str = "ddp"
    dtype: str = "float32"
    scaled: bool = True
    """Whether the loss is scaled."""
    attribute: bool = False
    """Whether the engine looks at each rank's gradients before the wire."""
    accumulation_steps: int = 2
    micro_batch_size: int = 8
    shard_size: int | None = None
    device: str = "cpu"
    compile: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the forward and backward pass."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def config(self) -> RunConfig:
        """As a run's configuration."""
        train = TrainConfig(
            max_steps=1_000_000,
            accumulation_steps=self.accumulation_steps,
            micro_batch_size=self.micro_batch_size,
            max_grad_norm=MAX_GRAD_NORM,
            compile=self.compile,
        )
        scale = LossScaleConfig(enabled=self.scaled, initial=_INITIAL_SCALE, attribute=self.attribute)
        betas = list(OPTIMIZER["betas"])  # type: ignore[call-overload]
        return RunConfig(
            device=Device(self.device),
            train=train,
            precision=PrecisionConfig(dtype=Dtype(self.dtype), loss_scale=scale),
            parallel=ParallelConfig(strategy=Strategy(self.strategy), shard_size=self.shard_size),
            optimizer={"_target_": "torch.optim.AdamW", **OPTIMIZER, "betas": betas},
        )

    def learner(self, rank: int, world_size: int) -> Learner:
        """The engine's."""
        config, host = self.config(), "localhost"
        config.cluster.processes_per_node = world_size
        shape = BatchShape(self.micro_batch_size, self.accumulation_steps, world_size)
        ranks = Ranks(rank, world_size, rank, world_size, 0, host)
        return build_learner(config, self.job, torch.device(self.device), ranks, shape, steps=1_000_000)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The same groups and settings as the engine's; fused too."""
        return torch.optim.AdamW(self.job.parameter_groups(model), fused=True, **OPTIMIZER)  # type: ignore[arg-type]


class HandWritten:
    """What a careful person writes: autocast, no_sync, GradScaler, clipping, a fused optimizer, the mean loss."""

    def __init__(self, setup: Setup, world_size: int) -> None:
        self.setup = setup
        self.world_size = world_size
        torch.manual_seed(0)
        self.model: nn.Module = setup.job.build_model().to(setup.device)
        if setup.compile:
            self.model.compile()
        if setup.strategy == "fsdp":
            self._shard()
        elif world_size > 1:
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizer = setup.optimizer(self.model)
        self.scaler = torch.amp.GradScaler(setup.device, init_scale=_INITIAL_SCALE, enabled=setup.scaled)

    def _shard(self) -> None:
        half = self.setup.torch_dtype if self.setup.dtype != "float32" else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(self.setup.device, (self.world_size,))
        for part in [*self.setup.job.blocks(self.model), self.model]:
            fully_shard(part, mesh=mesh, mp_policy=policy)

    def step(self, batches: Sequence[Batch]) -> float:
        """One optimizer step; returns the mean loss over the ranks."""
        setup = self.setup
        total = torch.zeros((), device=setup.device)
        for index, (tokens, targets) in enumerate(batches):
            with self._synchronising(index == len(batches) - 1):
                with torch.autocast(setup.device, dtype=setup.torch_dtype, enabled=setup.dtype != "float32"):
                    logits = self.model(tokens)
                    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / len(batches)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.world_size > 1:
            dist.all_reduce(total)
        mean = total.item() / self.world_size
        assert math.isfinite(mean)
        return mean

    def _synchronising(self, last: bool) -> AbstractContextManager[None]:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        elif isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

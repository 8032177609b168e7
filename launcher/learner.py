"""From a configuration to a Learner: the model, laid out over the ranks, its optimizer, and all that a step needs."""

from __future__ import annotations

import random

import torch
from torch import nn

from launcher.config.instantiate import build_optimizer, optimizer_factory
from launcher.config.schema import Dtype, RunConfig, Strategy
from launcher.config.sizes import shard_ranks
from launcher.environment import Ranks
from launcher.errors import JobError
from launcher.job import Job
from launcher.parallel import Layout, parallelize
from launcher.precision import (
    ControlCollective,
    FoldedOptimizer,
    SteppedParameters,
    build_loss_scale,
    is_elementwise,
)
from launcher.training.batches import BatchShape, derived_seed
from launcher.training.schedule import Schedule
from launcher.training.step import Learner

__all__ = ["build_learner", "seed_everything"]

_DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16, Dtype.float16: torch.float16}


def build_learner(
    config: RunConfig, job: Job, device: torch.device, ranks: Ranks, shape: BatchShape, steps: int
) -> Learner:
    """The model, laid out over the ranks, with all that a step needs; the same weights for the same seed."""
    seed_everything(derived_seed(config.seed, "model"))
    dtype = _DTYPES[config.precision.dtype]
    layout = Layout(
        device=device,
        dtype=dtype,
        world_size=ranks.world_size,
        shard_size=_shard_size(config, ranks),
        compile=config.train.compile,
        probe=config.precision.loss_scale.enabled and config.precision.loss_scale.attribute,
        compression=config.compression,
    )
    model = parallelize(job, config.parallel, layout)
    groups = list(job.parameter_groups(model.module))
    if not groups:
        raise JobError(f"{type(job).__name__}: there is no parameter to train; every one is frozen, or there is none.")
    stepped = SteppedParameters()
    if is_elementwise(optimizer_factory(config.optimizer)):
        groups = stepped.local(groups)
    optimizer = FoldedOptimizer(build_optimizer(config.optimizer, groups), stepped)
    return Learner(
        job=job,
        model=model,
        optimizer=optimizer,
        parameter_names=_parameter_names(model.module, optimizer),
        loss_scale=build_loss_scale(config.precision.loss_scale, device),
        schedule=Schedule(config.schedule, steps, device),
        control=ControlCollective(device, ranks.world_size, ranks.rank),
        device=device,
        dtype=dtype,
        max_grad_norm=config.train.max_grad_norm,
        world_size=ranks.world_size,
        accumulation_steps=shape.accumulation_steps,
        measure_every=config.train.log_every,
    )


def _parameter_names(model: nn.Module, optimizer: FoldedOptimizer) -> list[str]:
    """Of what is trained, by module path, in the optimizer's order."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return [names.get(parameter, "?") for parameter in optimizer.parameters]


def _shard_size(config: RunConfig, ranks: Ranks) -> int:
    """The ranks that share one copy of the master weights."""
    if config.parallel.strategy is Strategy.ddp:
        return 1
    return shard_ranks(config) if config.parallel.strategy is Strategy.hsdp else ranks.world_size


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's generators, CUDA's included."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)

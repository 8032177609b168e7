"""What a single field's type cannot say: ranges, and rules across fields.

Everything is checked before a process starts or a directory is made, and everything that is wrong
is reported at once. ``check`` needs the facts of the machine (how many GPUs) as arguments, so that
it can be tested, and used for a machine other than this one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from launcher.config.bounds import at_least, positive
from launcher.config.compression_rules import compression_problems
from launcher.config.node_rules import node_problems, node_warnings
from launcher.config.schema import (
    Axis,
    Codec,
    Decay,
    Device,
    Dtype,
    RunConfig,
    Strategy,
)
from launcher.config.sizes import shard_ranks, world_size
from launcher.config.slurm_rules import slurm_problems, slurm_warnings
from launcher.config.words import shown
from launcher.errors import ConfigurationError

__all__ = ["check"]


def check(config: RunConfig, num_gpus: int) -> list[str]:
    """Refuse what cannot work; return warnings on what works, but hardly as meant.

    Args:
        config: with device and processes_per_node filled in.
        num_gpus: CUDA devices on each node.

    Raises:
        ConfigurationError: naming every value that is wrong, the valid ones, and what to do.
    """
    problems = [*_names(config), *_sizes(config), *_length_and_batch(config), *_placement(config, num_gpus)]
    problems += [
        *node_problems(config),
        *_parallel(config),
        *compression_problems(config.compression, config.parallel.strategy),
        *_loss_scale(config),
        *_optimizer(config),
        *_schedule(config),
        *_checkpoint(config),
        *(slurm_problems(config) if config.cluster.kind == "slurm" else ()),
    ]
    if problems:
        raise ConfigurationError("\n".join(problems))
    return list(_warnings(config))


def _names(config: RunConfig) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        yield (
            f"name={config.name!r} cannot name a folder: use letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
    if not 0 <= config.seed < 2**63:
        yield f"seed={config.seed} is out of range: use a whole number from 0 to 2^63 - 1."
    if not config.job.get("_target_"):
        yield (
            "There is no job: choose an experiment (launch +experiment=digits), a job (launch +job=digits), "
            "or name a class of yours (+job._target_=my_module.MyJob)."
        )


def _sizes(config: RunConfig) -> Iterator[str]:
    train, cluster = config.train, config.cluster
    for name in (
        "max_steps",
        "max_epochs",
        "global_batch_size",
        "accumulation_steps",
        "micro_batch_size",
        "log_every",
        "eval_every",
    ):
        yield from at_least(f"train.{name}", getattr(train, name), 1)
    yield from at_least("train.num_data_workers", train.num_data_workers, 0)
    yield from positive("train.max_grad_norm", train.max_grad_norm)
    yield from at_least("cluster.processes_per_node", cluster.processes_per_node, 1)
    yield from at_least("cluster.max_restarts", cluster.max_restarts, 0)


def _length_and_batch(config: RunConfig) -> Iterator[str]:
    train = config.train
    if (train.max_steps is None) == (train.max_epochs is None):
        given = "both are" if train.max_steps is not None else "neither is"
        yield (
            f"train.max_steps={shown(train.max_steps)} and train.max_epochs={shown(train.max_epochs)}: {given} "
            "given. Give exactly one, and set the other to null."
        )
    if train.micro_batch_size is None:
        yield "train.micro_batch_size is missing: give the number of samples per forward pass on one worker."
    if (train.global_batch_size is None) == (train.accumulation_steps is None):
        given = "both are" if train.global_batch_size is not None else "neither is"
        yield (
            f"train.global_batch_size={shown(train.global_batch_size)} and "
            f"train.accumulation_steps={shown(train.accumulation_steps)}: {given} given. "
            "Give exactly one, and set the other to null."
        )


def _placement(config: RunConfig, num_gpus: int) -> Iterator[str]:
    cluster = config.cluster
    if cluster.kind not in ("local", "slurm", "torchrun"):
        yield f"cluster.kind={cluster.kind!r} does not exist: choose cluster=local or cluster=slurm."
    if config.device is Device.cuda:
        if cluster.kind == "slurm" and num_gpus == 0:
            return  # said better by slurm_problems
        if num_gpus == 0:
            yield "device=cuda, but torch sees no CUDA GPU here: use device=cpu, or device=auto."
        elif (cluster.processes_per_node or 0) > num_gpus:
            there = "of each node" if cluster.kind == "slurm" else "here"
            yield (
                f"cluster.processes_per_node={cluster.processes_per_node} is more than the {num_gpus} GPU(s) {there}: "
                f"use at most {num_gpus}, or device=cpu."
            )


def _parallel(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    yield from at_least("parallel.shard_size", parallel.shard_size, 1)
    yield from positive("parallel.bucket_mib", parallel.bucket_mib)
    if parallel.strategy is not Strategy.hsdp and parallel.shard_size is not None:
        yield (
            f"parallel.shard_size={parallel.shard_size} is for parallel=hsdp alone: "
            f"leave it null with parallel.strategy={parallel.strategy.value}."
        )


def _loss_scale(config: RunConfig) -> Iterator[str]:
    scale = config.precision.loss_scale
    prefix = "precision.loss_scale."
    for name in ("initial", "minimum", "maximum"):
        yield from positive(prefix + name, getattr(scale, name))
    if not scale.growth_factor > 1.0 or not math.isfinite(scale.growth_factor):
        yield f"{prefix}growth_factor={scale.growth_factor} must be greater than 1."
    if not 0.0 < scale.backoff_factor < 1.0:
        yield f"{prefix}backoff_factor={scale.backoff_factor} must lie between 0 and 1."
    for name in ("growth_interval", "hysteresis", "patience"):
        yield from at_least(prefix + name, getattr(scale, name), 1)
    if scale.enabled and not scale.minimum <= scale.initial <= scale.maximum:
        yield (f"{prefix}initial={scale.initial} must lie between minimum={scale.minimum} and maximum={scale.maximum}.")


def _optimizer(config: RunConfig) -> Iterator[str]:
    if not config.optimizer.get("_target_"):
        yield "optimizer._target_ is missing: choose optimizer=adamw, adam or sgd, or name a torch.optim.Optimizer."
    rate: Any = config.optimizer.get("lr")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not (rate >= 0 and math.isfinite(rate)):
        yield f"optimizer.lr={rate!r} must be a finite number of at least 0, such as 1e-3."


def _schedule(config: RunConfig) -> Iterator[str]:
    schedule = config.schedule
    yield from at_least("schedule.warmup_steps", schedule.warmup_steps, 0)
    if not 0.0 <= schedule.final_fraction <= 1.0:
        yield f"schedule.final_fraction={schedule.final_fraction} must lie between 0 and 1."


def _checkpoint(config: RunConfig) -> Iterator[str]:
    checkpoint = config.checkpoint
    yield from at_least("checkpoint.every_steps", checkpoint.every_steps, 1)
    yield from positive("checkpoint.every_minutes", checkpoint.every_minutes)
    yield from at_least("checkpoint.keep", checkpoint.keep, 1)
    yield from at_least("checkpoint.keep_best", checkpoint.keep_best, 0)


def _warnings(config: RunConfig) -> Iterator[str]:
    precision, train, schedule = config.precision, config.train, config.schedule
    if config.cluster.kind == "slurm":
        yield from slurm_warnings(config)
    yield from node_warnings(config)
    if precision.dtype is Dtype.float16 and not precision.loss_scale.enabled:
        yield (
            "precision.dtype=float16 with precision.loss_scale.enabled=false: gradients below 6e-8 become zero and "
            "training may stall without an error. Use precision=fp16 as it is, or precision=bf16."
        )
    if config.compression.codec is Codec.fp16 and not precision.loss_scale.enabled:
        yield (
            "compression=fp16 without a loss scale: gradients below 6e-8 times the number of workers become zero on "
            "the wire. Use precision=fp16, precision.loss_scale.enabled=true, or compression=bf16."
        )
    if config.compression.codec is not Codec.none and world_size(config) == 1:
        yield f"compression={config.compression.codec.value} has no effect: one worker sends no gradients."
    elif _compresses_one_replica(config):
        yield (
            f"compression={config.compression.codec.value} has no effect between replicas: there is one. "
            "Use a smaller parallel.shard_size"
            + ("." if config.compression.codec is Codec.powersgd else ", or compression.axis=all.")
        )
    if train.max_steps is not None and schedule.warmup_steps >= train.max_steps:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} is not below train.max_steps={train.max_steps}: "
            "the learning rate never leaves its warm-up."
        )
    checkpoint = config.checkpoint
    if not checkpoint.enabled:
        yield "checkpoint.enabled=false: a run that stops or fails is lost, and nothing can be exported from it."
    elif checkpoint.every_steps is None and checkpoint.every_minutes is None:
        yield (
            "checkpoint.every_steps and checkpoint.every_minutes are both null: only a request to stop and the end of "
            "the run save anything; whatever kills it costs all of it."
        )
    if checkpoint.enabled and checkpoint.keep_best and train.eval_every is None:
        yield (
            f"checkpoint.keep_best={checkpoint.keep_best} has no effect without train.eval_every: only the last step "
            "is validated, and is saved in any case."
        )
    if schedule.decay is Decay.constant and schedule.final_fraction != 0.0:
        yield f"schedule.final_fraction={schedule.final_fraction} has no effect with schedule=constant."


def _compresses_one_replica(config: RunConfig) -> bool:
    compression = config.compression
    if compression.codec is Codec.none or config.parallel.strategy is not Strategy.hsdp:
        return False
    return compression.axis is not Axis.all and world_size(config) == shard_ranks(config)

"""One rank's life: environment, process group, build, train, leave."""

from __future__ import annotations

import atexit
import os
import random
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Never, TextIO

import torch
import torch.distributed as dist
from torch import nn

from launcher.config.files import load_config
from launcher.config.instantiate import build_job, build_optimizer, optimizer_factory
from launcher.config.rules import accumulation_steps, shard_ranks
from launcher.config.schema import Device, Dtype, RunConfig, Strategy
from launcher.environment import Ranks, thread_limit
from launcher.errors import EXIT_FINISHED, JobError
from launcher.job import Job
from launcher.observe import RunFacts, build_reporter
from launcher.observe.ranklog import Streams, redirect_to_log
from launcher.orphans import die_with_parent
from launcher.parallel import Layout, parallelize
from launcher.precision import (
    ControlCollective,
    FoldedOptimizer,
    SteppedParameters,
    build_loss_scale,
    is_elementwise,
)
from launcher.rundir import RunDirectory, State, Status, write_json
from launcher.rundir.failures import Failure
from launcher.training.batches import BatchShape, TrainingData, checked_dataset, derived_seed
from launcher.training.digest import parameters_digest
from launcher.training.loop import Outcome, Trainer, total_steps
from launcher.training.schedule import Schedule
from launcher.training.step import Learner
from launcher.training.stop import StopRequest

__all__ = ["leave_now", "live", "main"]

_DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16, Dtype.float16: torch.float16}
_GROUP_TIMEOUT = timedelta(minutes=30)


def main(run_path: str, attempt: int, parent: int) -> Outcome:
    """Be one of the workers that an elastic agent in the launching process starts.

    Args:
        run_path: the run's directory.
        attempt: from 0.
        parent: the id of the launching process, whose death ends this one.
    """
    die_with_parent(parent)
    return live(RunDirectory(Path(run_path)), attempt)


def live(run: RunDirectory, attempt: int, on_failure: Callable[[Failure, Streams], None] | None = None) -> Outcome:
    """Be one worker of one attempt, from the environment that an elastic agent has set.

    A failure leaves a file for the launching process and ends this process at once: the peers'
    connections break, and they end too.

    Args:
        run: the run's directory.
        attempt: from 0.
        on_failure: called last, with the failure and the streams that this process was started with.
    """
    stop = StopRequest()
    stop.listen()
    ranks = Ranks.from_environment(os.environ)
    log = run.rank_log(attempt, ranks.rank)
    streams = redirect_to_log(log, ranks.rank)
    life = _Life(run, attempt, ranks, stop, streams.terminal)
    _alive.append(life)
    try:
        outcome = life.live()
        atexit.register(leave_now, EXIT_FINISHED)
        return outcome
    except BaseException as error:
        failure = Failure.of(error, ranks.rank, ranks.host, log, life.steps_attempted)
        failure.write(run.rank_failure(attempt, ranks.rank))
        print(failure.traceback or failure.message, file=sys.stderr, flush=True)
        life.close()
        if on_failure is not None:
            on_failure(failure, streams)
        os._exit(failure.exit_code)


_alive: list[_Life] = []
"""Keeps what a worker has built until the process ends. Freeing a process group's last user can deadlock: its
destructor joins gloo's threads while it holds the interpreter's lock, which they may need."""


def leave_now(code: int) -> Never:
    """End this process without freeing anything, for the same reason."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Life:
    """What a worker builds, in order."""

    def __init__(
        self, run: RunDirectory, attempt: int, ranks: Ranks, stop: StopRequest, terminal: TextIO | None
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._ranks = ranks
        self._stop = stop
        self._terminal = terminal
        self._trainer: Trainer | None = None

    @property
    def steps_attempted(self) -> int | None:
        """None before the first step."""
        return self._trainer.learner.steps or None if self._trainer is not None else None

    def live(self) -> Outcome:
        """Train, report the result, and leave the process group together."""
        started = time.time()
        config = load_config(self._run.config)
        device = _enter_group(config, self._ranks)
        self._trainer = self._build(config, device)
        outcome = self._trainer.train()
        digest = parameters_digest(self._trainer.learner.model.module)
        if self._ranks.rank == 0:
            self._conclude(outcome, digest, time.time() - started)
        self.close()
        if self._ranks.world_size > 1:
            dist.barrier()
        dist.destroy_process_group()
        return outcome

    def close(self) -> None:
        """Let go of the console, so that what follows stands below the live line."""
        if self._trainer is not None:
            self._trainer.reporter.close()

    def _build(self, config: RunConfig, device: torch.device) -> Trainer:
        ranks, train = self._ranks, config.train
        assert train.micro_batch_size is not None
        job = build_job(config.job)
        dataset = checked_dataset(job, "train")
        assert dataset is not None
        shape = BatchShape(train.micro_batch_size, accumulation_steps(config, ranks.world_size), ranks.world_size)
        data = TrainingData(job, dataset, shape, ranks.rank, config.seed)
        steps = total_steps(train, shape.global_batch_size, data.num_samples)
        learner = _build_learner(config, job, device, ranks, shape, steps)
        _seed_everything(derived_seed(config.seed, "rank", ranks.rank))
        facts = RunFacts(
            name=config.name,
            attempt=self._attempt,
            total_steps=steps,
            global_batch_size=shape.global_batch_size,
            num_samples=data.num_samples,
            learning_rate=float(config.optimizer["lr"]),
            device=device,
        )
        status = Status(State.running, attempt=self._attempt, hosts=(ranks.host,))
        return Trainer(
            learner=learner,
            data=data,
            validation=checked_dataset(job, "validation"),
            config=train,
            loss_scale=config.precision.loss_scale,
            total_steps=steps,
            reporter=build_reporter(
                self._run, facts, self._terminal, config.tracking.console.value, train.log_every, status
            ),
            stop=self._stop,
            hosts=_all_hosts(ranks),
        )

    def _conclude(self, outcome: Outcome, digest: str, seconds: float) -> None:
        assert self._trainer is not None
        if not outcome.finished:
            self._trainer.reporter.event("stop", step=outcome.step)
            return
        result = {
            "state": State.finished.value,
            "step": outcome.step,
            "loss": outcome.loss,
            "validation": outcome.validation,
            "parameters_digest": digest,
            "seconds": seconds,
        }
        write_json(self._run.result, result)
        self._trainer.reporter.finish(result)


def _enter_group(config: RunConfig, ranks: Ranks) -> torch.device:
    """Set up this process for its device, and join the others."""
    threads = thread_limit(os.environ, ranks.local_world_size)
    if threads is not None:
        torch.set_num_threads(threads)
    if ranks.world_size == ranks.local_world_size and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # host names need not resolve on one machine
    if config.device is Device.cuda:
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=_GROUP_TIMEOUT, device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT)
    return device


def _build_learner(
    config: RunConfig, job: Job, device: torch.device, ranks: Ranks, shape: BatchShape, steps: int
) -> Learner:
    _seed_everything(derived_seed(config.seed, "model"))
    dtype = _DTYPES[config.precision.dtype]
    layout = Layout(
        device=device,
        dtype=dtype,
        world_size=ranks.world_size,
        shard_size=_shard_size(config, ranks),
        compile=config.train.compile,
        probe=config.precision.loss_scale.enabled and config.precision.loss_scale.attribute,
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
    )


def _all_hosts(ranks: Ranks) -> tuple[str, ...]:
    """Each rank's host; collective."""
    hosts: list[str] = [""] * ranks.world_size
    dist.all_gather_object(hosts, ranks.host)
    return tuple(hosts)


def _parameter_names(model: nn.Module, optimizer: FoldedOptimizer) -> list[str]:
    """Of what is trained, by module path, in the optimizer's order."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return [names.get(parameter, "?") for parameter in optimizer.parameters]


def _shard_size(config: RunConfig, ranks: Ranks) -> int:
    """The ranks that share one copy of the master weights."""
    if config.parallel.strategy is Strategy.ddp:
        return 1
    return shard_ranks(config) if config.parallel.strategy is Strategy.hsdp else ranks.world_size


def _seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's generators, CUDA's included."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)

"""From a configuration to a Trainer: job, data, model, optimizer, in that order, on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from launcher.checkpoint import CheckpointStore, Found, Manifest
from launcher.checkpoint.saver import Saver
from launcher.config.files import to_yaml
from launcher.config.instantiate import build_job
from launcher.config.schema import BestMode, RunConfig
from launcher.config.sizes import accumulation_steps, node_range
from launcher.environment import Ranks
from launcher.errors import JobError
from launcher.job import Job
from launcher.learner import build_learner, seed_everything
from launcher.observe import Reporter, RunFacts
from launcher.parallel.initial import load_initial_weights
from launcher.training.batches import BatchShape, Data, checked_dataset, derived_seed, training_data
from launcher.training.beginning import build_and_read
from launcher.training.checkpointing import Checkpoints, NoCheckpoints, RunCheckpoints
from launcher.training.loop import Trainer, total_steps
from launcher.training.progress import Identity, Progress, continued
from launcher.training.step import Learner
from launcher.training.stop import StopRequest

__all__ = ["build_trainer"]


def build_trainer(
    config: RunConfig,
    device: torch.device,
    ranks: Ranks,
    stop: StopRequest,
    report_to: Callable[[RunFacts], Reporter],
    store: CheckpointStore,
) -> Trainer:
    """Build everything; collective.

    Args:
        config: of the run.
        device: this rank's.
        ranks: where this process stands.
        stop: the request to stop that the loop looks at.
        report_to: makes this rank's reporter.
        store: the run's checkpoints; the newest valid one is gone on from.

    Raises:
        JobError: the job's model or data cannot be used.
        CheckpointError: there are checkpoints, and none can be used.
        RequestError: the weights of ``train.init_from`` are not the model's.
    """
    train = config.train
    assert train.micro_batch_size is not None
    job = build_job(config.job)
    # The user's code builds data before the generators are set: it may draw from them.
    dataset, validation = checked_dataset(job, "train"), checked_dataset(job, "validation")
    assert dataset is not None
    _refuse_unfit_data(config, job, dataset, validation)
    shape = BatchShape(train.micro_batch_size, accumulation_steps(config, ranks.world_size), ranks.world_size)
    data = training_data(job, dataset, shape, ranks.rank, config.seed)

    begun = _begin(config, job, data, device, ranks, store)
    facts = RunFacts(
        config=config,
        total_steps=begun.total_steps,
        global_batch_size=shape.global_batch_size,
        num_samples=data.num_samples,
        device=device,
        hosts=_all_hosts(ranks),
        sample_offset=begun.progress.offset,
    )
    reporter = report_to(facts)
    if begun.found.checkpoint is not None:
        _report_resume(reporter, begun.found, begun.notes)
    return Trainer(
        learner=begun.learner,
        data=data,
        validation=validation,
        config=train,
        loss_scale=config.precision.loss_scale,
        total_steps=begun.total_steps,
        reporter=reporter,
        stop=stop,
        hosts=facts.hosts,
        identity=begun.identity,
        progress=begun.progress,
        checkpoints=_checkpoints(store, config, device, ranks, reporter, begun),
    )


@dataclass(frozen=True)
class _Beginning:
    """Where an attempt begins."""

    learner: Learner
    total_steps: int
    found: Found
    """The checkpoint that it goes on from, if there is one."""
    identity: Identity
    progress: Progress
    notes: list[str]
    """What is not as it was, in words."""


def _begin(
    config: RunConfig, job: Job, data: Data, device: torch.device, ranks: Ranks, store: CheckpointStore
) -> _Beginning:
    """Build the learner, and put it where the run stands; newer checkpoints that are damaged are set aside.

    Collective.
    """

    def build(done: Manifest | None) -> tuple[Learner, int]:
        before = (done.step, done.samples) if done is not None else (0, 0)
        steps = total_steps(config.train, data.shape.global_batch_size, data.num_samples, *before)
        learner = build_learner(config, job, device, ranks, data.shape, steps)
        seed_everything(derived_seed(config.seed, "rank", ranks.rank, before[0]))
        return learner, steps

    learner, steps, found, reading = build_and_read(store, config.checkpoint, ranks.rank, ranks.world_size, build)
    identity, progress, notes = _identity(config, ranks), Progress(), list[str]()
    if reading is not None:
        progress, notes = continued(learner, data, identity, reading)
    elif config.train.init_from is not None:
        load_initial_weights(learner.model.module, Path(config.train.init_from))
    if ranks.rank == 0 and config.checkpoint.enabled:
        store.clean()
        store.pass_over(found)
    return _Beginning(learner, steps, found, identity, progress, notes)


def _refuse_unfit_data(config: RunConfig, job: Job, dataset: object, validation: object) -> None:
    """Before anything is trained: what would be noticed only when the best checkpoint is wanted, or a node is lost."""
    keep = config.checkpoint.keep_best
    if config.checkpoint.enabled and keep and validation is None:
        raise JobError(
            f"checkpoint.keep_best={keep}, but {type(job).__name__}.build_dataset('validation') returned None: there "
            "is nothing to judge the best by. Return a validation dataset, or use checkpoint.keep_best=0."
        )
    if isinstance(dataset, IterableDataset) and node_range(config).is_elastic:
        raise JobError(
            f"cluster.nodes={config.cluster.nodes} with an IterableDataset ({type(dataset).__name__}): its state "
            "belongs to one number of ranks. Use one number of machines, or a map-style dataset."
        )


def _report_resume(reporter: Reporter, found: Found, notes: list[str]) -> None:
    assert found.checkpoint is not None
    reporter.event(
        "resume",
        step=found.checkpoint.step,
        path=f"{found.checkpoint.path.parent.name}/{found.checkpoint.path.name}",
        passed_over=[f"{path.name}: {reason}" for path, reason in found.passed_over],
        notes=notes,
    )


def _identity(config: RunConfig, ranks: Ranks) -> Identity:
    return Identity(
        strategy=config.parallel.strategy.value,
        dtype=config.precision.dtype.value,
        config_digest=hashlib.sha256(to_yaml(config).encode()).hexdigest(),
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )


def _checkpoints(
    store: CheckpointStore,
    config: RunConfig,
    device: torch.device,
    ranks: Ranks,
    reporter: Reporter,
    begun: _Beginning,
) -> Checkpoints:
    settings = config.checkpoint
    if not settings.enabled:
        return NoCheckpoints()
    highest = settings.best_mode is BestMode.max
    saver = Saver(
        store,
        ranks.rank,
        ranks.world_size,
        device,
        settings.asynchronous,
        prune=partial(store.prune, settings.keep, settings.keep_best, settings.best_metric, highest),
    )
    last_step = begun.found.checkpoint.step if begun.found.checkpoint is not None else None
    return RunCheckpoints(saver, settings, reporter, ranks.rank, last_step=last_step, best=begun.progress.best)


def _all_hosts(ranks: Ranks) -> tuple[str, ...]:
    """Each rank's host; collective."""
    hosts: list[str] = [""] * ranks.world_size
    dist.all_gather_object(hosts, ranks.host)
    return tuple(hosts)

"""Validation: each sample once, on any number of ranks, in one pass and one collective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from launcher.errors import JobError
from launcher.training.step import Learner, checked, to_device
from launcher.training.workers import leave_signals_to_parent

__all__ = ["validate"]


class _Shares:
    """This rank's batches of indices. Every rank gets as many; a batch beyond the data repeats sample 0."""

    def __init__(self, num_samples: int, batch_size: int, world_size: int, rank: int) -> None:
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._stride = batch_size * world_size
        self._offset = batch_size * rank

    def __len__(self) -> int:
        return -(-self._num_samples // self._stride)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self._offset, self._offset + len(self) * self._stride, self._stride):
            yield list(range(start, min(start + self._batch_size, self._num_samples))) or [0]

    def counts(self, batch: int) -> bool:
        """Whether a batch holds samples of its own, or is only there so that all ranks make as many passes."""
        return self._offset + batch * self._stride < self._num_samples


def validate(
    learner: Learner, dataset: Dataset[Any], batch_size: int, rank: int, num_data_workers: int
) -> dict[str, float]:
    """``loss`` and the job's metrics, as means over the items of the whole dataset; the same on every rank.

    Raises:
        JobError: ``compute_loss`` names other metrics on another batch.
    """
    shares = _Shares(len(dataset), batch_size, learner.world_size, rank)  # type: ignore[arg-type]
    loader = DataLoader(
        dataset,
        batch_sampler=shares,
        collate_fn=learner.job.collate,
        num_workers=num_data_workers,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # validating must not move the run's generators
    )
    names: list[str] | None = None
    totals = torch.zeros(0)
    with learner.model.evaluating() as model:
        for index, batch in enumerate(loader):
            with learner.autocast():
                output = checked(learner.job.compute_loss(model, to_device(batch, learner.device)), learner.job)
            found = sorted(output.metrics)
            if names is None:
                names = found
                totals = torch.zeros(2 + len(names), dtype=torch.float64, device=learner.device)
            if found != names:
                raise JobError(
                    f"{type(learner.job).__name__}.compute_loss gave the metrics {found} for one batch and {names} "
                    "for another: give the same names for every batch."
                )
            if shares.counts(index):
                sums = [output.loss, output.items, *(output.metrics[name] for name in names)]
                totals += torch.stack([torch.as_tensor(value, device=learner.device).double() for value in sums])
    assert names is not None
    if learner.world_size > 1:
        dist.all_reduce(totals)
    loss, items, *metrics = totals.tolist()
    divisor = items if items > 0 else float("nan")
    return {"loss": loss / divisor, **{name: value / divisor for name, value in zip(names, metrics, strict=True)}}

"""Which sample is used when, by whom: a pure function of (seed, position), so that it can be taken up anywhere.

The samples of all epochs, joined end to end, form one endless sequence. Step ``k`` uses positions
``k·G`` to ``(k+1)·G - 1``, ``G`` being the global batch size; micro-batch ``m`` of rank ``r`` is a
slice of these. Whatever the number of workers, each sample comes once per epoch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from launcher.config.streams import stream_problem
from launcher.errors import JobError
from launcher.job import Job
from launcher.training.workers import leave_signals_to_parent

__all__ = [
    "BatchShape",
    "Data",
    "SampleOrder",
    "TrainingData",
    "checked_dataset",
    "derived_seed",
    "seeded",
    "training_data",
]


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from the run's seed and a purpose; unrelated for unrelated parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SampleOrder:
    """The order of the samples: a fresh permutation for each epoch, epochs joined end to end."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self._num_samples = num_samples
        self._seed = seed
        self._permutations: dict[int, Tensor] = {}

    def sample(self, position: int) -> int:
        """The dataset's index of the sample at a position of the endless sequence."""
        epoch, place = divmod(position, self._num_samples)
        return int(self._permutation(epoch)[place])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(derived_seed(self._seed, "epoch", epoch))
            kept = {number: order for number, order in self._permutations.items() if number == epoch - 1}
            self._permutations = {**kept, epoch: torch.randperm(self._num_samples, generator=generator)}
        return self._permutations[epoch]


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut into micro-batches over the ranks."""

    micro_batch_size: int
    accumulation_steps: int
    world_size: int

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    def positions(self, step: int, micro_batch: int, rank: int) -> range:
        """The positions that one micro-batch of one rank takes, in step ``step`` (from 0)."""
        place = micro_batch * self.world_size + rank
        start = step * self.global_batch_size + place * self.micro_batch_size
        return range(start, start + self.micro_batch_size)


class _MicroBatches:
    """The batch sampler: this rank's micro-batches from one step to another, as lists of (position, index).

    Args:
        offset: samples used before step 0, had every step been of this shape; see ``TrainingData.micro_batches``.
    """

    def __init__(self, order: SampleOrder, shape: BatchShape, rank: int, steps: range, offset: int) -> None:
        self._order = order
        self._shape = shape
        self._rank = rank
        self._steps = steps
        self._offset = offset

    def __len__(self) -> int:
        return len(self._steps) * self._shape.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self._steps:
            for micro_batch in range(self._shape.accumulation_steps):
                positions = self._shape.positions(step, micro_batch, self._rank)
                used = [position + self._offset for position in positions]
                yield [(position, self._order.sample(position)) for position in used]


class _SeededBatches(Dataset[Any]):
    """Reads and collates a micro-batch with the random generators set from its first position.

    What reading and collating draw is then the same however many data workers there are, and after a resume.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[Sequence[Any]], Any], seed: int) -> None:
        self._dataset = dataset
        self._collate = collate
        self._seed = seed

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> Any:
        indices = [index for _, index in places]
        with seeded(derived_seed(self._seed, "samples", places[0][0])):
            if hasattr(self._dataset, "__getitems__"):
                return self._collate(list(self._dataset.__getitems__(indices)))
            return self._collate([self._dataset[index] for index in indices])


def _as_it_is(batch: Any) -> Any:
    """For the loader: the batch is collated already."""
    return batch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, torch's and NumPy's CPU generators, seeded inside and untouched outside."""
    import numpy

    python_state, torch_state, numpy_state = random.getstate(), torch.get_rng_state(), numpy.random.get_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        numpy.random.set_state(numpy_state)


def checked_dataset(job: Job, split: str) -> Dataset[Any] | None:
    """The job's dataset of a split, refused if the engine cannot use it.

    Raises:
        JobError: it is not map-style, or empty, or there is none to train on.
    """
    dataset = job.build_dataset(split)
    name = f"{type(job).__name__}.build_dataset({split!r})"
    if dataset is None:
        if split == "train":
            raise JobError(f"{name} returned None: there must be a dataset to train on.")
        return None
    if problem := stream_problem(job, split, dataset):
        raise JobError(problem)
    if isinstance(dataset, IterableDataset):
        return dataset
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise JobError(f"{name} returned {type(dataset).__name__}: a dataset needs __len__ and __getitem__.")
    if len(dataset) == 0:
        raise JobError(f"{name} returned an empty dataset: there must be at least one sample.")
    return dataset


class Data(Protocol):
    """What the loop trains on."""

    @property
    def shape(self) -> BatchShape:
        """Of a step."""

    @property
    def rank(self) -> int:
        """Whose part it is."""

    @property
    def num_samples(self) -> int | None:
        """Samples per epoch; None where nobody knows."""

    def micro_batches(self, steps: range, num_data_workers: int, pin_memory: bool, offset: int = 0) -> Iterator[Any]:
        """Collated micro-batches of ``steps``, ``accumulation_steps`` of them for each step."""

    def state_dict(self) -> dict[str, Any]:
        """What the steps and the offset do not say of this rank's place in the data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""


@dataclass(frozen=True)
class TrainingData:
    """One rank's part of the endless sequence of samples."""

    job: Job
    dataset: Dataset[Any]
    shape: BatchShape
    rank: int
    seed: int

    @property
    def num_samples(self) -> int:
        """Samples per epoch."""
        return len(self.dataset)  # type: ignore[arg-type]  # checked_dataset has seen to it

    def micro_batches(self, steps: range, num_data_workers: int, pin_memory: bool, offset: int = 0) -> Iterator[Any]:
        """Collated micro-batches of ``steps``, ``accumulation_steps`` of them for each step.

        Args:
            steps: which; the first uses the positions from ``steps.start · global batch size + offset`` on.
            num_data_workers: processes that load; 0: this one.
            pin_memory: for copies to a GPU.
            offset: 0, unless earlier steps were of another global batch size.
        """
        order = SampleOrder(self.num_samples, self.seed)
        loader = DataLoader(
            _SeededBatches(self.dataset, self.job.collate, self.seed),
            batch_sampler=_MicroBatches(order, self.shape, self.rank, steps, offset),
            collate_fn=_as_it_is,
            num_workers=num_data_workers,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # the loader draws a seed when it starts: not from the run's generators
        )
        return iter(loader)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the place in the data follows from the steps."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def training_data(job: Job, dataset: Dataset[Any], shape: BatchShape, rank: int, seed: int) -> Data:
    """What the loop trains on, whatever the kind of dataset."""
    if isinstance(dataset, IterableDataset):
        from launcher.training.streams import StreamedData

        return StreamedData(job, dataset, shape, rank, seed)
    return TrainingData(job, dataset, shape, rank, seed)

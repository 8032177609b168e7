"""Data that can only be read in one direction, and says itself where it is: an IterableDataset with a state.

Each rank reads its own dataset, which must take care by itself that the ranks' samples differ. Its state is kept
per rank, and so belongs to that number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from launcher.errors import JobError
from launcher.job import Job
from launcher.training.batches import BatchShape, derived_seed, seeded

__all__ = ["StreamedData"]


@dataclass
class StreamedData:
    """One rank's stream, begun again whenever it ends."""

    job: Job
    dataset: IterableDataset[Any]
    shape: BatchShape
    rank: int
    seed: int
    _samples: Iterator[Any] | None = field(default=None, init=False)

    @property
    def num_samples(self) -> None:
        """Nobody knows."""
        return

    def micro_batches(self, steps: range, num_data_workers: int, pin_memory: bool, offset: int = 0) -> Iterator[Any]:
        """Collated micro-batches of ``steps``, from where the dataset is; never read ahead.

        Random generators are set from the micro-batch's place, as for a map-style dataset.

        Raises:
            JobError: data workers are asked for, which would each have a state of their own; or the stream is empty.
        """
        if num_data_workers:
            raise JobError(
                f"train.num_data_workers={num_data_workers}, but {type(self.dataset).__name__} is an IterableDataset, "
                "whose place in the data is known in the process that reads it: use train.num_data_workers=0."
            )
        for step in steps:
            for micro_batch in range(self.shape.accumulation_steps):
                position = self.shape.positions(step, micro_batch, self.rank).start + offset
                with seeded(derived_seed(self.seed, "samples", position)):
                    batch = self.job.collate(self._take(self.shape.micro_batch_size))
                yield batch

    def _take(self, count: int) -> list[Any]:
        taken: list[Any] = []
        begun_again = False
        while len(taken) < count:
            if self._samples is None:
                self._samples = iter(self.dataset)
            more = list(islice(self._samples, count - len(taken)))
            if not more and begun_again:
                raise JobError(f"{type(self.dataset).__name__} has no samples for rank {self.rank}.")
            taken += more
            if len(taken) < count:
                self._samples, begun_again = None, True
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The dataset's own."""
        state: dict[str, Any] = self.dataset.state_dict()  # type: ignore[attr-defined]  # checked_dataset has seen it
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand the dataset its state, before it is read."""
        self.dataset.load_state_dict(state)  # type: ignore[attr-defined]
        self._samples = None

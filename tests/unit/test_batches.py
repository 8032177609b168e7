"""Which sample is used when is a pure function of seed and position."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from launcher import Job, LossOutput
from launcher.errors import JobError
from launcher.training.batches import BatchShape, SampleOrder, TrainingData, checked_dataset, derived_seed

SHAPES = st.builds(BatchShape, st.integers(1, 5), st.integers(1, 4), st.integers(1, 5))


class Numbers(Dataset[Any]):
    """Indices, with noise from every generator that an augmentation may use."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), float(numpy.random.rand()), float(torch.rand(()))


class Batched(Numbers):
    """Reads a whole micro-batch at once."""

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("__getitems__ is there")

    def __getitems__(self, indices: list[int]) -> list[int]:
        return indices


class Endless(IterableDataset[int]):
    """No place in the data can be restored."""

    def __iter__(self) -> Any:
        return iter(range(3))


class Unsized(Dataset[int]):
    """No __len__."""

    def __getitem__(self, index: int) -> int:
        return index


class AnyJob(Job):
    """Only its dataset matters."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def build_model(self) -> nn.Module:
        raise NotImplementedError

    def build_dataset(self, split: str) -> Any:
        return self.dataset

    def compute_loss(self, model: nn.Module, batch: Any) -> LossOutput:
        raise NotImplementedError

    def collate(self, samples: Any) -> Any:
        return list(samples)


class Masking(AnyJob):
    """Draws while it collates, as masked language models do."""

    def collate(self, samples: Any) -> Any:
        return [(*sample, random.random(), float(numpy.random.rand()), float(torch.rand(()))) for sample in samples]


def read(shape: BatchShape, steps: range, length: int, rank: int = 0, workers: int = 0, seed: int = 0) -> list[Any]:
    dataset = Numbers(length)
    data = TrainingData(Masking(dataset), dataset, shape, rank, seed)
    return list(data.micro_batches(steps, workers, pin_memory=False))


@given(SHAPES, st.integers(0, 1000))
def test_the_micro_batches_of_a_step_are_its_global_batch_exactly(shape: BatchShape, step: int) -> None:
    positions = [
        position
        for micro_batch in range(shape.accumulation_steps)
        for rank in range(shape.world_size)
        for position in shape.positions(step, micro_batch, rank)
    ]
    size = shape.global_batch_size
    assert size == shape.micro_batch_size * shape.accumulation_steps * shape.world_size
    assert sorted(positions) == list(range(step * size, (step + 1) * size))


@given(st.integers(1, 40), st.integers(0, 2**62), st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(num_samples, seed)
    places = range(epoch * num_samples, (epoch + 1) * num_samples)
    assert sorted(order.sample(position) for position in places) == list(range(num_samples))


@given(SHAPES, st.integers(1, 30), st.integers(0, 99))
def test_every_sample_is_used_once_per_epoch_over_any_split(shape: BatchShape, num_samples: int, seed: int) -> None:
    order = SampleOrder(num_samples, seed)
    steps = -(-2 * num_samples // shape.global_batch_size)
    used = sorted(
        (position, order.sample(position))
        for step in range(steps)
        for micro_batch in range(shape.accumulation_steps)
        for rank in range(shape.world_size)
        for position in shape.positions(step, micro_batch, rank)
    )
    for epoch in (0, 1):
        samples = [sample for _, sample in used[epoch * num_samples : (epoch + 1) * num_samples]]
        assert sorted(samples) == list(range(num_samples))


@given(st.integers(2, 50), st.lists(st.integers(0, 400), max_size=20))
def test_the_order_does_not_depend_on_what_was_asked_before(num_samples: int, asked: list[int]) -> None:
    used = SampleOrder(num_samples, seed=7)
    for position in asked:
        assert used.sample(position) == SampleOrder(num_samples, seed=7).sample(position)


def test_the_order_is_the_seeds_and_differs_between_epochs_and_seeds() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = SampleOrder(100, seed)
        return [order.sample(number * 100 + place) for place in range(100)]

    assert epoch(3, 0) == epoch(3, 0)
    assert len({tuple(epoch(seed, number)) for seed in (3, 4) for number in (0, 1, 2)}) == 6
    assert epoch(3, 0) != list(range(100))


def test_seeds_for_different_purposes_are_unrelated_and_fit_into_63_bits() -> None:
    parts: list[tuple[int | str, ...]] = [(0, "a"), (0, "b"), (1, "a"), (0, "epoch", 1), (0, "epoch", 11), ("0", "a")]
    seeds = {derived_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= derived_seed(number, "x") < 2**63 for number in range(100))
    assert derived_seed(0, "a") == derived_seed(0, "a")


def test_the_loader_gives_each_rank_its_micro_batches_in_order() -> None:
    shape = BatchShape(micro_batch_size=3, accumulation_steps=2, world_size=2)
    order = SampleOrder(10, seed=0)
    for rank in range(2):
        batches = read(shape, range(1, 4), length=10, rank=rank)
        expected = [
            [order.sample(position) for position in shape.positions(step, micro_batch, rank)]
            for step in range(1, 4)
            for micro_batch in range(2)
        ]
        assert [[index for index, *_ in batch] for batch in batches] == expected
        assert all(len(batch) == 3 for batch in batches), "an epoch's end cuts no batch short"


def test_two_epochs_of_loading_see_every_sample_twice() -> None:
    shape = BatchShape(micro_batch_size=2, accumulation_steps=1, world_size=2)
    seen = Counter(index for rank in (0, 1) for batch in read(shape, range(5), 10, rank) for index, *_ in batch)
    assert seen == Counter(dict.fromkeys(range(10), 2))


@given(SHAPES, SHAPES, st.integers(1, 30), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_every_sample_is_used_once_per_epoch_across_a_change_of_workers_and_batch_size(
    before: BatchShape, after: BatchShape, num_samples: int, steps: int
) -> None:
    used = steps * before.global_batch_size
    offset = used - steps * after.global_batch_size
    more = -(-2 * num_samples // after.global_batch_size)
    dataset = Numbers(num_samples)
    seen = [
        index
        for shape, span, shift in ((before, range(steps), 0), (after, range(steps, steps + more), offset))
        for position in sorted(
            position + shift
            for step in span
            for micro_batch in range(shape.accumulation_steps)
            for rank in range(shape.world_size)
            for position in shape.positions(step, micro_batch, rank)
        )
        for index in [SampleOrder(num_samples, 0).sample(position)]
    ]
    for epoch in range(len(seen) // num_samples):
        assert sorted(seen[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))
    data = TrainingData(AnyJob(dataset), dataset, after, rank=0, seed=0)
    first = next(data.micro_batches(range(steps, steps + 1), 0, False, offset))
    assert [index for index, *_ in first] == seen[used : used + after.micro_batch_size]


def test_what_reading_and_collating_draw_does_not_depend_on_data_workers_or_on_where_reading_began() -> None:
    shape = BatchShape(micro_batch_size=3, accumulation_steps=2, world_size=1)
    here = read(shape, range(4), length=10)
    assert read(shape, range(4), length=10, workers=2) == here
    assert read(shape, range(2, 4), length=10) == here[4:]
    noise = [drawn for batch in here for sample in batch for drawn in (sample[1:4], sample[4:])]
    assert len(set(noise)) == len(noise), "no two samples get the same noise"
    assert read(shape, range(4), length=10, seed=1) != here


def test_reading_leaves_the_global_generators_untouched() -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    shape = BatchShape(2, 1, 1)
    data = TrainingData(Masking(None), Numbers(8), shape, rank=0, seed=0)
    stream = data.micro_batches(range(4), 0, pin_memory=False)
    next(stream)  # the loader draws a seed of its own when it starts
    before = states()
    next(stream)
    assert states() == before


def test_a_dataset_that_reads_batches_is_asked_for_batches() -> None:
    data = TrainingData(AnyJob(None), Batched(5), BatchShape(5, 1, 1), rank=0, seed=0)
    (batch,) = data.micro_batches(range(1), 0, pin_memory=False)
    assert sorted(batch) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (None, "returned None"),
        (Endless(), "IterableDataset"),
        (Unsized(), "__len__"),
        (object(), "__getitem__"),
        (Numbers(0), "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_dataset_that_cannot_be_used_is_a_job_error(dataset: Any, words: str) -> None:
    with pytest.raises(JobError, match=rf"AnyJob\.build_dataset\('train'\) .*{words}"):
        checked_dataset(AnyJob(dataset), "train")


def test_there_need_be_no_validation_dataset_but_an_empty_one_is_refused() -> None:
    assert checked_dataset(AnyJob(None), "validation") is None
    with pytest.raises(JobError, match="empty"):
        checked_dataset(AnyJob([]), "validation")
    assert checked_dataset(AnyJob([1]), "train") == [1]

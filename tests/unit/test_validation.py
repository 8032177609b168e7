"""Validation counts each sample once, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from launcher import LossOutput
from launcher.errors import JobError
from launcher.training.validation import _Shares, validate
from tests.unit.learners import UnevenJob, learner_for, uneven_samples


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 9))
def test_each_sample_counts_once_and_every_rank_makes_as_many_passes(
    num_samples: int, batch_size: int, world_size: int
) -> None:
    shares = [_Shares(num_samples, batch_size, world_size, rank) for rank in range(world_size)]
    batches = [list(share) for share in shares]
    assert len({len(own) for own in batches}) == 1
    counted = []
    for share, own in zip(shares, batches, strict=True):
        assert len(own) == len(share)
        assert all(0 < len(batch) <= batch_size for batch in own), "a loader cannot read an empty batch"
        assert all(0 <= index < num_samples for batch in own for index in batch)
        counted += [index for place, batch in enumerate(own) if share.counts(place) for index in batch]
    assert sorted(counted) == list(range(num_samples))
    assert len(shares[0]) == -(-num_samples // (batch_size * world_size)), "and no pass more than needed"


@pytest.mark.parametrize(("num_samples", "batch_size"), [(7, 3), (6, 3), (2, 3), (5, 1)])
def test_metrics_are_means_over_all_items(num_samples: int, batch_size: int) -> None:
    learner = learner_for()
    samples = uneven_samples(num_samples)
    inputs, targets, mask = (torch.stack(parts) for parts in zip(*samples, strict=True))
    with torch.no_grad():
        error = (learner.model.module(inputs).squeeze(-1) - targets).square() * mask
    mean = float(error.double().sum() / mask.sum())
    metrics = validate(learner, samples, batch_size, rank=0, num_data_workers=0)  # type: ignore[arg-type]
    assert list(metrics) == ["loss", "error"]
    assert metrics["loss"] == pytest.approx(mean, rel=1e-6)
    assert metrics["error"] == pytest.approx(2 * mean, rel=1e-6)


def test_validation_runs_in_evaluation_mode_without_gradients_and_changes_nothing() -> None:
    modes = []

    class Watching(UnevenJob):
        def compute_loss(self, model: nn.Module, batch: Any) -> LossOutput:
            modes.append((model.training, torch.is_grad_enabled()))
            return super().compute_loss(model, batch)

    learner = learner_for(Watching())
    before = [parameter.detach().clone() for parameter in learner.model.module.parameters()]
    validate(learner, uneven_samples(4), 2, rank=0, num_data_workers=0)  # type: ignore[arg-type]
    assert modes == [(False, False)] * 2
    assert learner.model.module.training
    for old, parameter in zip(before, learner.model.module.parameters(), strict=True):
        assert parameter.equal(old)
        assert parameter.grad is None


def test_metrics_whose_names_change_are_a_job_error() -> None:
    class Changing(UnevenJob):
        calls = 0

        def compute_loss(self, model: nn.Module, batch: Any) -> LossOutput:
            self.calls += 1
            right = super().compute_loss(model, batch)
            return LossOutput(right.loss, right.items, {f"error_{self.calls}": right.loss})

    with pytest.raises(JobError, match="the same names for every batch"):
        validate(learner_for(Changing()), uneven_samples(4), 2, rank=0, num_data_workers=0)  # type: ignore[arg-type]

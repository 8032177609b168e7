"""From the second step on, train_step never waits for the device."""

import dataclasses

import pytest
import torch
from launcher.jobs.language_model import LanguageModelJob

from benchmarks.contestants import Setup, random_batches
from benchmarks.counting import HostSyncError, RefuseHostSyncs
from launcher.precision import FoldedOptimizer
from launcher.training.step import train_step

JOB = LanguageModelJob(context=8, num_layers=1, num_heads=1, width=8)
SETUP = Setup(JOB, micro_batch_size=2)


def steady(setup):
    """A learner after its first step, and micro-batches for the next."""
    learner = setup.learner(rank=0, world_size=1)
    batches = random_batches(JOB, setup.accumulation_steps, setup.micro_batch_size)
    train_step(learner, batches, stop=False)
    return learner, batches


@pytest.mark.parametrize(("dtype", "scaled"), [("float16", True), ("bfloat16", False), ("float32", False)])
def test_a_steady_step_never_waits_for_the_device(dtype, scaled):
    learner, batches = steady(dataclasses.replace(SETUP, dtype=dtype, scaled=scaled))
    with RefuseHostSyncs():
        for _ in range(3):
            ticket = train_step(learner, batches, stop=False)
    assert ticket.read().step == 4


def test_an_overflow_does_not_wait_either():
    learner, batches = steady(dataclasses.replace(SETUP, dtype="float16"))
    learner.loss_scale.scale.fill_(2.0**24 * 1e6)
    with RefuseHostSyncs():
        ticket = train_step(learner, batches, stop=False)
    assert ticket.read().overflow


def test_an_optimizer_that_cannot_fold_is_caught_waiting():
    learner, batches = steady(SETUP)
    learner.optimizer = FoldedOptimizer(torch.optim.RMSprop(learner.model.module.parameters(), lr=1e-3))
    with RefuseHostSyncs(), pytest.raises(HostSyncError, match="_local_scalar_dense"):
        train_step(learner, batches, stop=False)

"""One optimizer step on one process: exact normalisation, exact accumulation, clipping, skipping."""

from __future__ import annotations

import copy
import math
from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from launcher import LossOutput
from launcher.errors import JobError
from launcher.training.step import Learner, to_device, train_step
from tests.unit.learners import UnevenJob, learner_for, uneven_samples

FP16_SCALE: dict[str, Any] = {"precision__loss_scale__enabled": True, "precision__loss_scale__initial": 1024.0}


def cut(samples: list[Any], *sizes: int) -> list[Any]:
    """Collated micro-batches of these sizes."""
    job, rest, batches = UnevenJob(), list(samples), []
    for size in sizes:
        batches.append(job.collate(rest[:size]))
        rest = rest[size:]
    assert not rest
    return batches


def parameters(learner: Learner) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in learner.model.module.parameters()]


def expected_gradients(model: nn.Module, samples: list[Any]) -> tuple[float, list[Tensor]]:
    """Mean loss over all items and its gradient, in one pass in float64."""
    model = copy.deepcopy(model).double()
    inputs, targets, mask = (torch.stack(parts).double() for parts in zip(*samples, strict=True))
    loss = ((model(inputs).squeeze(-1) - targets).square() * mask).sum() / mask.sum()
    return float(loss.detach()), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("scale", [{}, FP16_SCALE], ids=["no scale", "scale 1024"])
@pytest.mark.parametrize("sizes", [(9,), (1, 8), (4, 1, 4), (1,) * 9], ids=str)
def test_the_gradient_is_that_of_the_mean_over_all_items(sizes: tuple[int, ...], scale: dict[str, Any]) -> None:
    samples = uneven_samples(9)
    learner = learner_for(accumulation_steps=len(sizes), **scale)
    before = parameters(learner)
    loss, gradients = expected_gradients(learner.model.module, samples)
    numbers = train_step(learner, cut(samples, *sizes), stop=False).read()
    for old, new, gradient in zip(before, parameters(learner), gradients, strict=True):
        torch.testing.assert_close((old - new).double(), gradient, rtol=1e-5, atol=1e-6)
    assert numbers.loss == pytest.approx(loss, rel=1e-6)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    assert numbers.grad_norm == pytest.approx(norm, rel=1e-6)
    assert numbers.loss_scale == scale.get("precision__loss_scale__initial", 1.0)
    assert (numbers.step, numbers.applied_steps, numbers.overflow, numbers.stop) == (1, 1, False, False)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=15)
def test_any_split_into_micro_batches_gives_the_same_parameters(first: list[int], second: list[int]) -> None:
    sizes = [*first, max(0, sum(second) - sum(first))], [*second, max(0, sum(first) - sum(second))]
    results = []
    for split in ([size for size in part if size] for part in sizes):
        samples = uneven_samples(sum(split))
        learner = learner_for(accumulation_steps=len(split), train__max_grad_norm=0.5, **FP16_SCALE)
        for _ in range(2):
            train_step(learner, cut(samples, *split), stop=False)
        results.append(parameters(learner))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_a_later_step_with_other_item_counts_is_normalised_by_its_own() -> None:
    learner = learner_for()
    train_step(learner, cut(uneven_samples(2), 2), stop=False)
    samples = uneven_samples(40, seed=1)
    before = parameters(learner)
    _, gradients = expected_gradients(learner.model.module, samples)
    train_step(learner, cut(samples, 40), stop=False)
    for old, new, gradient in zip(before, parameters(learner), gradients, strict=True):
        torch.testing.assert_close((old - new).double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_clipping_equals_that_of_torch(max_norm: float) -> None:
    samples = uneven_samples(6)
    learner = learner_for(train__max_grad_norm=max_norm, **FP16_SCALE)
    before = parameters(learner)
    _, gradients = expected_gradients(learner.model.module, samples)
    holders = [nn.Parameter(gradient) for gradient in gradients]
    for holder, gradient in zip(holders, gradients, strict=True):
        holder.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(holders, max_norm)
    numbers = train_step(learner, cut(samples, 6), stop=False).read()
    assert numbers.grad_norm == pytest.approx(float(norm), rel=1e-6), "reported before clipping"
    for old, new, holder in zip(before, parameters(learner), holders, strict=True):
        torch.testing.assert_close((old - new).double(), holder.grad, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_micro_batch_that_overflows_skips_the_step(place: int, bad: float) -> None:
    learner = learner_for(accumulation_steps=3, schedule__warmup_steps=4, **FP16_SCALE)
    batches = cut(uneven_samples(6), 2, 2, 2)
    before = parameters(learner)
    broken = [*batches]
    broken[place] = (batches[place][0], torch.full_like(batches[place][1], bad), torch.ones_like(batches[place][2]))
    numbers = train_step(learner, broken, stop=False).read()
    assert numbers.overflow
    assert (numbers.step, numbers.applied_steps) == (1, 0)
    assert numbers.loss_scale == 1024.0, "the scale of the step itself"
    assert float(learner.loss_scale.scale) == 512.0
    assert float(learner.schedule.factor()) == 0.25
    for old, new in zip(before, parameters(learner), strict=True):
        assert old.equal(new)

    numbers = train_step(learner, batches, stop=False).read()
    assert not numbers.overflow
    assert (numbers.step, numbers.applied_steps, numbers.loss_scale) == (2, 1, 512.0)
    assert numbers.rate_factor == 0.25, "the skipped step has not advanced the schedule"
    assert not parameters(learner)[0].equal(before[0])


def test_gradients_are_gone_after_a_step_skipped_or_not() -> None:
    learner = learner_for(**FP16_SCALE)
    inputs, targets, mask = cut(uneven_samples(2), 2)[0]
    for batch in ((inputs, targets / 0, mask), (inputs, targets, mask)):
        train_step(learner, [batch], stop=False)
        assert all(parameter.grad is None for parameter in learner.model.module.parameters())


@pytest.mark.parametrize("optimizer", [None, {"_target_": "torch.optim.AdamW", "lr": 1e-2}], ids=["SGD", "AdamW"])
def test_a_step_without_items_leaves_finite_weights(optimizer: dict[str, Any] | None) -> None:
    learner = learner_for(train__max_grad_norm=1.0, **({"optimizer": optimizer} if optimizer else {}))
    inputs, targets, mask = cut(uneven_samples(2), 2)[0]
    numbers = train_step(learner, [(inputs, targets, torch.zeros_like(mask))], stop=False).read()
    assert not numbers.overflow
    assert math.isnan(numbers.loss), "there is no mean over nothing"
    assert all(parameter.isfinite().all() for parameter in parameters(learner))
    before = parameters(learner)
    numbers = train_step(learner, [(inputs, targets, mask)], stop=False).read()
    assert math.isfinite(numbers.loss)
    assert not parameters(learner)[0].equal(before[0])


def test_a_vote_to_stop_is_in_the_numbers() -> None:
    assert train_step(learner_for(), cut(uneven_samples(2), 2), stop=True).read().stop


def test_the_forward_pass_runs_under_autocast_and_the_weights_stay_fp32() -> None:
    seen = []

    class Watching(UnevenJob):
        def compute_loss(self, model: nn.Module, batch: Any) -> LossOutput:
            seen.append(model(batch[0]).dtype)
            return super().compute_loss(model, batch)

    for dtype in ("float32", "bfloat16", "float16"):
        learner = learner_for(Watching(), precision__dtype=dtype)
        train_step(learner, cut(uneven_samples(2), 2), stop=False)
        assert parameters(learner)[0].dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16, torch.float16]


class Returning(UnevenJob):
    """Returns what it is told to."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def compute_loss(self, model: nn.Module, batch: Any) -> Any:
        return self.output(super().compute_loss(model, batch))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda right: right.loss, "returned Tensor"),
        (lambda right: None, "returned NoneType"),
        (lambda right: LossOutput(right.loss.expand(2), 2), r"scalar tensor.*not \(2,\)"),
        (lambda right: LossOutput(right.loss.item(), 2), "scalar tensor.*not float"),
        (lambda right: LossOutput(right.loss.detach(), 2), "has no gradient"),
        (lambda right: LossOutput(right.loss, torch.ones(2)), r"items must be .*not \(2,\)"),
        (lambda right: LossOutput(right.loss, None), "items must be .*not NoneType"),
    ],
)
def test_an_output_that_cannot_be_used_is_a_job_error(output: Any, words: str) -> None:
    with pytest.raises(JobError, match=rf"Returning\.compute_loss.*{words}"):
        train_step(learner_for(Returning(output)), cut(uneven_samples(2), 2), stop=False)


@pytest.mark.parametrize("items", [14, 14.0, torch.tensor(14), torch.tensor(14.0)], ids=repr)
def test_items_may_be_a_number_or_a_scalar_tensor(items: Any) -> None:
    learner = learner_for(Returning(lambda right: LossOutput(right.loss, items)))
    assert train_step(learner, cut(uneven_samples(2), 2), stop=False).read().applied_steps == 1


def test_a_job_without_a_model_or_without_parameters_to_train_is_refused() -> None:
    class NoModel(UnevenJob):
        def build_model(self) -> Any:
            return 3

    class Frozen(UnevenJob):
        def build_model(self) -> nn.Module:
            return super().build_model().requires_grad_(False)

    with pytest.raises(JobError, match="build_model returned int"):
        learner_for(NoModel())
    with pytest.raises(JobError, match="no parameter to train"):
        learner_for(Frozen())


def test_the_same_seed_builds_the_same_weights() -> None:
    assert parameters(learner_for(seed=5))[0].equal(parameters(learner_for(seed=5))[0])
    assert not parameters(learner_for(seed=5))[0].equal(parameters(learner_for(seed=6))[0])


Pair = namedtuple("Pair", "left right")


def test_a_batch_keeps_its_form_on_its_way_to_the_device() -> None:
    batch = {"a": [torch.ones(1), "text"], "b": Pair(torch.ones(1), (torch.ones(1), 3))}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1] == "text"
    assert isinstance(moved["b"], Pair)
    assert moved["b"].left.is_meta
    assert moved["b"].right[0].is_meta
    assert moved["b"].right[1] == 3


class NormsInBrainFloat(UnevenJob):
    """What a norm's weights are in a forward pass under fsdp with 16 bits."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(3).bfloat16(), nn.Linear(3, 1))


def test_a_norm_that_cpus_refuse_is_told_what_to_be_given() -> None:
    learner = learner_for(NormsInBrainFloat())
    with pytest.raises(RuntimeError, match="mixed dtype") as caught:
        train_step(learner, cut(uneven_samples(8), 8), stop=False)
    (note,) = caught.value.__notes__
    assert "norm(x.to(norm.weight.dtype))" in note

"""A deferred model gets, bit by bit, the weights of an ordinary build, and is never held as a whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from launcher.jobs.digits import DigitsJob
from launcher.jobs.language_model import LanguageModelJob
from torch import Tensor, nn

from launcher.parallel.deferred import DeferredModel, NotDeferrableError, build_deferred


class Assorted(nn.Module):
    """Ways to initialise that models in the wild use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 20)
        self.middle = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Embedding(7, 5, padding_idx=2))
        self.made = nn.Parameter(torch.randn(3, 4) * 0.02)
        self.whole = nn.Parameter(torch.ones(2, 3).t().contiguous())
        self.tied = nn.Linear(10, 20)
        self.tied.weight = self.first.weight
        self.convolution = nn.Conv2d(3, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.BatchNorm1d(5)
        self.recurrent = nn.LSTM(3, 4)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)))
        self.register_buffer("table", torch.tensor([1.0, 2.0]))
        self.register_buffer("steps", torch.arange(5) / 5)
        nn.init.trunc_normal_(self.middle[0].weight, std=0.02)
        nn.init.orthogonal_(self.convolution.weight)
        nn.init.xavier_normal_(self.attention.out_proj.weight)
        with torch.no_grad():
            self.made[0].zero_()
            self.first.bias.mul_(2)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data.normal_(0, 0.02)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "assorted": Assorted,
    "gpt": LanguageModelJob(max_bytes=50_000).build_model,
    "digits": DigitsJob().build_model,
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
def test_a_replay_gives_the_weights_of_a_build_and_leaves_the_generator_where_a_build_does(
    build: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(3)
    built, next_number = tensors(build()), torch.rand(1)
    torch.manual_seed(3)
    deferred = build_deferred(build)
    replayed = {name: value.clone() for name, value in deferred.replay()}
    assert torch.equal(torch.rand(1), next_number)
    assert replayed.keys() == built.keys()
    for name, value in built.items():
        assert torch.equal(replayed[name], value), name


def gpt() -> DeferredModel:
    return build_deferred(BUILDS["gpt"])


def test_a_replay_holds_a_small_part_of_the_model() -> None:
    deferred = gpt()
    total = sum(parameter.numel() * 4 for parameter in deferred.module.parameters())
    largest = max(parameter.numel() * 4 for parameter in deferred.module.parameters())
    for _ in deferred.replay():
        pass
    assert deferred.peak_bytes <= 2 * largest < total / 4


def test_the_deferred_model_has_no_memory_and_keeps_its_ties() -> None:
    deferred = build_deferred(Assorted)
    assert all(tensor.is_meta for tensor in tensors(deferred.module).values())
    assert deferred.module.tied.weight is deferred.module.first.weight


def test_code_that_looks_at_values_is_not_deferrable() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
            if self.weight.sum() > 0:
                self.weight.data.neg_()

    with pytest.raises(NotDeferrableError):
        build_deferred(Looks)


def test_a_frozen_parameter_stays_frozen() -> None:
    def build() -> nn.Module:
        return nn.Linear(3, 3).requires_grad_(False)

    assert not any(parameter.requires_grad for parameter in build_deferred(build).module.parameters())


def test_torch_still_has_what_the_recorder_relies_on() -> None:
    assert callable(torch.nn.init._no_grad_trunc_normal_)

"""The folded optimizer step is unscale, clip and step; a skipped one changes nothing at all."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.precision import FoldedOptimizer

STEP, SKIP = torch.tensor(0.0), torch.tensor(1.0)
SHAPES = [(4, 3), (7,), (1,)]

Make = Callable[..., torch.optim.Optimizer]

FOLDING: dict[str, tuple[Make, dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "Adam, AMSGrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {"lr": 1e-1, "weight_decay": 0.01}),
    "SGD, momentum": (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9}),
    "SGD, Nesterov": (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9, "nesterov": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-1}),
}
SLOW: dict[str, tuple[Make, dict[str, Any]]] = {
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.5}),
    "SGD, dampening": (torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9, "dampening": 0.5}),
    "Adam, not fused": (torch.optim.Adam, {"lr": 1e-2, "fused": False}),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-2}),
}
ALL = {**FOLDING, **SLOW}
every_optimizer = pytest.mark.parametrize("kind", ALL)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(shape, generator=generator) * scale for shape in SHAPES]


def folded(kind: str, targets: list[nn.Parameter], **changes: Any) -> FoldedOptimizer:
    make, arguments = ALL[kind]
    fused = {"fused": True} if kind in FOLDING or kind == "SGD, dampening" else {}
    return FoldedOptimizer(make(targets, **{**fused, **arguments, **changes}))


def plain(kind: str, targets: list[nn.Parameter], **changes: Any) -> torch.optim.Optimizer:
    make, arguments = ALL[kind]
    return make(targets, **{**arguments, "foreach": False, **changes})


def give(targets: list[nn.Parameter], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.grad = value.clone()


def snapshot(optimizer: torch.optim.Optimizer) -> list[Any]:
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return [[parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]], state]


def assert_bitwise_equal(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("kind", "folds"), [*((kind, True) for kind in FOLDING), *((kind, False) for kind in SLOW)])
def test_fused_optimizers_fold_and_others_say_that_they_do_not(
    kind: str, folds: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert folded(kind, parameters()).folds is folds
    assert ("cannot fold" in caplog.text) is not folds


@every_optimizer
def test_a_step_equals_unscale_clip_and_step(kind: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = folded(kind, ours), plain(kind, theirs)
    for step in range(5):
        scale, max_norm = 2.0 ** (10 + step), 0.5
        give(theirs, gradients(step))
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        reference.step()
        give(ours, gradients(step, scale))
        optimizer.step(scale * ((norm + 1e-6) / max_norm).clamp(min=1.0), STEP)
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@every_optimizer
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_skipped_step_leaves_weights_and_state_bitwise_alone(kind: str, bad: float) -> None:
    targets = parameters()
    optimizer = folded(kind, targets)
    for step in range(2):
        give(targets, gradients(step))
        optimizer.step(torch.tensor(1.0), STEP)
    before = snapshot(optimizer.optimizer)
    assert before[1] or kind == "SGD"
    broken = gradients(3)
    broken[1][2] = bad
    give(targets, broken)
    optimizer.step(torch.tensor(8.0), SKIP)
    assert_bitwise_equal(snapshot(optimizer.optimizer), before)


@every_optimizer
def test_a_first_step_that_is_skipped_leaves_no_trace_in_later_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty_like

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        # Memory that nobody has written may hold anything; here it never holds zeros by chance.
        return real(*arguments, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty_like", poisoned)
    skipped, fresh = parameters(), parameters()
    with_skip, without = folded(kind, skipped), folded(kind, fresh)
    for _ in range(2):
        give(skipped, [gradient * float("inf") for gradient in gradients(0)])
        with_skip.step(torch.tensor(4.0), SKIP)
    for step in range(1, 4):
        for targets, optimizer in ((skipped, with_skip), (fresh, without)):
            give(targets, gradients(step, 4.0))
            optimizer.step(torch.tensor(4.0), STEP)
    assert all(target.isfinite().all() for target in skipped)
    assert_bitwise_equal(snapshot(with_skip.optimizer), snapshot(without.optimizer))


@every_optimizer
def test_a_rate_factor_multiplies_each_groups_own_rate(kind: str) -> None:
    ours, theirs = parameters(), parameters()
    rates = (1e-2, 3e-2)
    groups: list[Any] = [{"params": ours[:1], "lr": rates[0]}, {"params": ours[1:], "lr": rates[1]}]
    optimizer = folded(kind, groups)
    halved: list[Any] = [{"params": theirs[:1], "lr": rates[0] / 2}, {"params": theirs[1:], "lr": rates[1] / 2}]
    reference = plain(kind, halved)
    for step in range(3):
        optimizer.set_rate_factor(torch.tensor(0.9, dtype=torch.float64))
        optimizer.set_rate_factor(torch.tensor(0.5, dtype=torch.float64))  # of the configured rate, not of the last
        give(ours, gradients(step, 4.0))
        optimizer.step(torch.tensor(4.0), STEP)
        give(theirs, gradients(step))
        reference.step()
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", FOLDING)
def test_a_folded_rate_stays_on_the_device(kind: str) -> None:
    optimizer = folded(kind, parameters())
    optimizer.set_rate_factor(torch.tensor(0.5, dtype=torch.float64))
    (rate,) = [group["lr"] for group in optimizer.optimizer.param_groups]
    assert isinstance(rate, Tensor)
    assert rate.dtype == torch.float32


@every_optimizer
def test_a_parameter_without_a_gradient_is_left_alone(kind: str) -> None:
    targets = parameters()
    optimizer = folded(kind, targets, weight_decay=0.1)
    frozen = targets[1].detach().clone()
    for step in range(2):
        give(targets, gradients(step))
        targets[1].grad = None
        measured = optimizer.gradients()
        assert measured.indices == [0, 2]
        assert [value.shape for value in measured.values] == [targets[0].shape, targets[2].shape]
        optimizer.step(torch.tensor(1.0), STEP)
    assert_bitwise_equal(targets[1].detach(), frozen)
    assert not targets[0].equal(parameters()[0])


@every_optimizer
def test_a_step_without_any_gradient_changes_nothing(kind: str) -> None:
    targets = parameters()
    optimizer = folded(kind, targets)
    optimizer.step(torch.tensor(1.0), STEP)
    assert_bitwise_equal([target.detach() for target in targets], [target.detach() for target in parameters()])


@every_optimizer
def test_zero_grad_forgets_the_gradients(kind: str) -> None:
    targets = parameters()
    optimizer = folded(kind, targets)
    give(targets, gradients(0))
    optimizer.zero_grad()
    assert optimizer.gradients().values == []
    assert all(target.grad is None for target in targets)
    assert optimizer.parameters == targets


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_torch_still_has_the_protocol_that_folding_relies_on(kind: str) -> None:
    optimizer = folded(kind, parameters()).optimizer
    assert optimizer._step_supports_amp_scaling is True  # type: ignore[attr-defined]
    targets = optimizer.param_groups[0]["params"]
    give(targets, gradients(0))
    before = snapshot(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), SKIP  # type: ignore[attr-defined]
    optimizer.step()
    assert_bitwise_equal(snapshot(optimizer)[0], before[0])


@pytest.mark.parametrize("fails", [False, True])
def test_the_protocols_attributes_do_not_outlive_a_step(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = parameters()
    optimizer = folded("AdamW", targets)
    give(targets, gradients(0))
    if fails:
        monkeypatch.setattr(optimizer.optimizer, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(torch.tensor(1.0), STEP)
    else:
        optimizer.step(torch.tensor(1.0), STEP)
    assert not hasattr(optimizer.optimizer, "grad_scale")
    assert not hasattr(optimizer.optimizer, "found_inf")

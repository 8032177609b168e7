"""DistributedGradScaler is torch.amp.GradScaler, on one rank, until it is asked to be more."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from launcher.config.schema import LossScaleConfig
from launcher.errors import ConfigurationError, JobError
from launcher.precision import DistributedGradScaler, DynamicLossScale

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "fused_sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "dampened_fused_sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused_adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "fused_adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused_adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}
PRIVATE_NAMES = {
    "_scale",
    "_growth_tracker",
    "_init_scale",
    "_init_growth_tracker",
    "_growth_factor",
    "_backoff_factor",
    "_growth_interval",
    "_device",
    "_enabled",
    "_per_optimizer_states",
}


def one_parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))


def iterate(scaler: Any, optimizer: Any, parameter: nn.Parameter, gradient: float, unscale: bool = False) -> None:
    """``gradient`` is unscaled; NaN and inf stay what they are."""
    scaler.scale((parameter * 0).sum()).backward()
    assert parameter.grad is not None
    parameter.grad += gradient * scaler.get_scale()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


gradients = st.sampled_from([1.0, -0.3, 2.5, math.inf, -math.inf, math.nan])


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    sequence=st.lists(st.tuples(gradients, st.booleans()), min_size=1, max_size=25),
    init_scale=st.sampled_from([65536.0, 3.0, 2.0**126]),
    growth_factor=st.floats(1.01, 4.0),
    backoff_factor=st.floats(0.25, 0.99),
    growth_interval=st.integers(1, 4),
    set_interval=st.tuples(st.integers(0, 25), st.integers(1, 6)),
)
def test_the_defaults_are_torchs_rule_step_for_step(
    name: str,
    sequence: list[tuple[float, bool]],
    init_scale: float,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    set_interval: tuple[int, int],
) -> None:
    arguments: Any = ("cpu", init_scale, growth_factor, backoff_factor, growth_interval)
    ours, theirs = DistributedGradScaler(*arguments), torch.amp.GradScaler(*arguments)
    our_parameter, their_parameter = one_parameter(), one_parameter()
    our_optimizer, their_optimizer = OPTIMIZERS[name]([our_parameter]), OPTIMIZERS[name]([their_parameter])
    stepped = False
    for index, (gradient, unscale) in enumerate(sequence):
        if index == set_interval[0]:
            ours.set_growth_interval(set_interval[1])
            theirs.set_growth_interval(set_interval[1])
        # An inf of torch's own making: the gradient times a scale near FP32's end.
        finite = math.isfinite(gradient) and math.isfinite(torch.tensor(gradient * ours.get_scale()).item())
        iterate(ours, our_optimizer, our_parameter, gradient, unscale)
        # torch's fused SGD reads uninitialised momentum after a first step that was skipped.
        if "sgd" not in name or "fused" not in name or stepped or finite:
            iterate(theirs, their_optimizer, their_parameter, gradient, unscale)
        else:
            iterate(theirs, torch.optim.SGD([their_parameter], lr=0.1), their_parameter, gradient, unscale)
        stepped = stepped or finite
        assert ours.state_dict() == theirs.state_dict()
        torch.testing.assert_close(our_parameter, their_parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_skipped_first_step_changes_nothing_and_the_second_is_a_first(name: str) -> None:
    parameter, untouched = one_parameter(), one_parameter()
    scaler, clean = DistributedGradScaler("cpu"), DistributedGradScaler("cpu")
    optimizer, never_skipped = OPTIMIZERS[name]([parameter]), OPTIMIZERS[name]([untouched])
    # So that uninitialised memory would be noticed.
    torch.empty(3).fill_(math.nan)
    iterate(scaler, optimizer, parameter, math.inf)
    assert torch.equal(parameter, untouched)
    for _ in range(2):
        iterate(scaler, optimizer, parameter, 0.5)
        iterate(clean, never_skipped, untouched, 0.5)
    assert torch.allclose(parameter, untouched, rtol=1e-6)


def test_fused_optimizers_are_handed_exactly_zero_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [one_parameter(), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    optimizer = torch.optim.Adam(parameters, lr=0.1, fused=True)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.found_inf.item()))  # type: ignore[attr-defined]
    scaler = DistributedGradScaler("cpu")
    for bad in [(True, True), (False, True), (False, False)]:
        for parameter, is_bad in zip(parameters, bad, strict=True):
            parameter.grad = torch.full_like(parameter, math.inf if is_bad else 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert seen == [1.0, 1.0, 0.0]


def test_unscale_divides_once_and_clipping_sees_true_gradients() -> None:
    parameter = one_parameter()
    optimizer = torch.optim.Adam([parameter], fused=True)
    scaler = DistributedGradScaler("cpu", init_scale=256.0)
    parameter.grad = torch.full((3,), 512.0)
    scaler.unscale_(optimizer)
    assert parameter.grad.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    assert parameter.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_the_users_own_grad_scale_is_multiplied_in(dampening: float) -> None:
    parameter = one_parameter()
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9, dampening=dampening, fused=True)
    scaler = DistributedGradScaler("cpu", init_scale=8.0)
    parameter.grad = torch.full((3,), 16.0)
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    scaler.step(optimizer)
    assert parameter.tolist() == [0.0, -3.0, 2.0]
    assert not hasattr(optimizer, "grad_scale")
    assert optimizer.param_groups[0]["fused"] is True


def test_a_parameter_that_joins_later_gets_its_momentum() -> None:
    first, late = one_parameter(), one_parameter()
    optimizer = torch.optim.SGD([first, late], lr=0.1, momentum=0.9, fused=True)
    scaler = DistributedGradScaler("cpu", init_scale=1.0)
    first.grad = torch.ones(3)
    scaler.step(optimizer)
    scaler.update()
    first.grad, late.grad = torch.ones(3), torch.ones(3)
    scaler.step(optimizer)
    assert torch.allclose(late, one_parameter() - 0.1)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_without_any_gradient_is_no_overflow(name: str) -> None:
    parameter = one_parameter()
    scaler, optimizer = DistributedGradScaler("cpu", growth_interval=1), OPTIMIZERS[name]([parameter])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**17
    assert torch.equal(parameter, one_parameter())


@pytest.mark.parametrize("backwards", [False, True])
def test_each_loads_the_others_state(backwards: bool) -> None:
    classes: list[Any] = [torch.amp.GradScaler, DistributedGradScaler]
    source_class, target_class = classes[::-1] if backwards else classes
    source, parameter = source_class("cpu", 1024.0, 3.0, 0.25, 7), one_parameter()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for gradient in [1.0, math.inf, 1.0, 1.0]:
        iterate(source, optimizer, parameter, gradient)
    target = target_class("cpu")
    target.load_state_dict(source.state_dict())
    assert target.state_dict() == source.state_dict()
    assert target.state_dict().keys() == torch.amp.GradScaler("cpu").state_dict().keys()
    for gradient in [1.0] * 6 + [math.nan]:
        for scaler in (source, target):
            iterate(scaler, optimizer, parameter, gradient)
    assert target.state_dict() == source.state_dict()


def test_hysteresis_tolerates_remembers_and_refills() -> None:
    scaler = DistributedGradScaler("cpu", 1024.0, growth_interval=2, hysteresis=2)
    parameter = one_parameter()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scales = []
    for gradient in [math.inf, math.inf, math.inf, 1.0, 1.0, math.inf, math.inf]:
        iterate(scaler, optimizer, parameter, gradient)
        scales.append(scaler.get_scale())
        # Whatever is saved and loaded in between makes no difference, nor does a copy.
        state = scaler.state_dict()
        scaler = DistributedGradScaler("cpu", hysteresis=2)
        scaler.load_state_dict(state)
        scaler = copy.deepcopy(scaler)
    assert scales == [1024.0, 512.0, 256.0, 256.0, 512.0, 512.0, 256.0]
    torch.amp.GradScaler("cpu").load_state_dict(scaler.state_dict())


def test_an_interval_set_below_the_tracker_waits_for_an_overflow_as_in_torch() -> None:
    scales = []
    for kind in (DistributedGradScaler, torch.amp.GradScaler):
        scaler, parameter = kind("cpu", 8.0), one_parameter()
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        for index, gradient in enumerate([1.0] * 6 + [math.inf, 1.0, 1.0]):
            if index == 3:
                scaler.set_growth_interval(2)
            iterate(scaler, optimizer, parameter, gradient)
            scales.append(scaler.get_scale())
    assert scales[:9] == scales[9:] == [8.0] * 6 + [4.0, 4.0, 8.0]


def test_usable_right_after_load_state_dict() -> None:
    for use in ("unscale_", "step"):
        scaler = DistributedGradScaler("cpu")
        scaler.load_state_dict(torch.amp.GradScaler("cpu", init_scale=4.0).state_dict())
        parameter = one_parameter()
        parameter.grad = torch.full((3,), 4.0)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        getattr(scaler, use)(optimizer)
        assert parameter.grad.tolist() == [1.0, 1.0, 1.0]
    DistributedGradScaler("cpu").update(2.0)


def test_floor_and_ceiling_hold_for_what_is_set_and_loaded() -> None:
    scaler = DistributedGradScaler("cpu", 8.0, minimum=2.0, maximum=16.0)
    for given_scale, kept in [(0.0, 2.0), (1e6, 16.0), (4.0, 4.0)]:
        scaler.update(given_scale)
        assert scaler.get_scale() == kept
        scaler.load_state_dict({**scaler.state_dict(), "scale": given_scale})
        assert scaler.get_scale() == kept


@pytest.mark.parametrize("fused", [False, True])
def test_a_scale_of_zero_never_steps(fused: bool) -> None:
    parameter = one_parameter()
    optimizer = torch.optim.Adam([parameter], fused=fused)
    scaler = DistributedGradScaler("cpu")
    scaler.update(0.0)
    iterate(scaler, optimizer, parameter, 1.0)
    assert torch.equal(parameter, one_parameter())


def test_sparse_gradients_are_refused_with_the_parameters_shape() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    scaler = DistributedGradScaler("cpu")
    scaler.scale(embedding(torch.tensor([1])).sum()).backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(JobError, match=r"shape \(5, 3\) is sparse.*sparse=False"):
        scaler.step(torch.optim.SGD(embedding.parameters(), lr=1.0))
    assert torch.equal(embedding.weight, before)


def test_fp16_gradients_are_refused_where_torch_refuses_them() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float16))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        DistributedGradScaler("cpu").unscale_(torch.optim.SGD([parameter], lr=1.0))


@pytest.mark.parametrize(
    "arguments",
    [{"hysteresis": 0}, {"minimum": -1.0}, {"minimum": 1e6}, {"maximum": 1.0}, {"minimum": math.nan}],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        DistributedGradScaler("cpu", **arguments)


def test_a_state_with_missing_or_unknown_keys_is_refused_whole() -> None:
    scaler = DistributedGradScaler("cpu")
    state = {**scaler.state_dict(), "scale": 2.0}
    for wrong in ({**state, "tolerance": 1}, {key: state[key] for key in state if key != "growth_factor"}):
        with pytest.raises(ConfigurationError, match="_growth_tracker"):
            scaler.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match="empty"):
        scaler.load_state_dict({})
    assert scaler.get_scale() == 65536.0


def test_disabled_is_torchs_no_op() -> None:
    scaler = DistributedGradScaler("cpu", enabled=False, hysteresis=3)
    parameter = one_parameter()
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(3)
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    scaler.load_state_dict({"anything": 1})
    assert parameter.tolist() == [0.0, -3.0, 2.0]
    assert (scaler.get_scale(), scaler.state_dict(), scaler.is_enabled()) == (1.0, {}, False)
    pickle.loads(pickle.dumps(scaler))


def test_update_without_a_step_is_an_error_as_in_torch() -> None:
    with pytest.raises(AssertionError, match="No inf checks"):
        DistributedGradScaler("cpu").update()


def test_saves_with_torch_and_pickles() -> None:
    scaler = DistributedGradScaler("cpu", 32.0, hysteresis=2)
    iterate(scaler, torch.optim.SGD([parameter := one_parameter()], lr=0.1), parameter, math.inf)
    buffer = io.BytesIO()
    torch.save(scaler.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == scaler.state_dict()
    assert pickle.loads(pickle.dumps(scaler)).state_dict() == scaler.state_dict()


def test_a_shorter_growth_interval_than_the_saved_runs_grows_at_the_next_clean_step() -> None:
    scale = DynamicLossScale(LossScaleConfig(initial=8.0, growth_interval=10), torch.device("cpu"))
    scale.load_state_dict({"scale": 8.0, "growth_tracker": 50, "tolerance": 1})
    scale.update(torch.zeros(()))
    assert scale.state_dict() == {"scale": 16.0, "growth_tracker": 0, "tolerance": 1}


def test_torch_still_has_the_private_names_that_are_relied_on() -> None:
    base = torch.amp.GradScaler
    assert vars(base("cpu")).keys() >= PRIVATE_NAMES
    parameters = {
        name: list(inspect.signature(getattr(base, name)).parameters)
        for name in ("_unscale_grads_", "_check_scale_growth_tracker", "_lazy_init_scale_growth_tracker")
    }
    assert parameters == {
        "_unscale_grads_": ["self", "optimizer", "inv_scale", "found_inf", "allow_fp16"],
        "_check_scale_growth_tracker": ["self", "funcname"],
        "_lazy_init_scale_growth_tracker": ["self", "dev"],
    }
    # Whoever needs the scale goes through the check that makes it, and every unscaling through the one that agrees.
    for method in (base.unscale_, base.step, base.update, base._check_inf_per_device):
        assert "_check_scale_growth_tracker" in inspect.getsource(method)
    for method in (base.unscale_, base._check_inf_per_device):
        assert "_unscale_grads_" in inspect.getsource(method)
    scaler = base("cpu")
    scaler.scale(torch.ones(()))
    optimizer = torch.optim.SGD([one_parameter()], lr=1.0)
    scaler.unscale_(optimizer)
    assert "found_inf_per_device" in scaler._per_optimizer_states[id(optimizer)]
    schema = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default._schema
    assert [argument.name for argument in schema.arguments] == ["self", "found_inf", "inv_scale"]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])  # in 2.11 Adagrad does not
def test_torchs_fused_optimizers_still_announce_themselves(kind: Any) -> None:
    optimizer = kind([one_parameter()], lr=0.1, fused=True)
    assert vars(optimizer)["_step_supports_amp_scaling"] is True
    assert {"fused", "foreach"} <= optimizer.param_groups[0].keys()


def test_the_public_methods_are_torchs() -> None:
    for name, method in inspect.getmembers(torch.amp.GradScaler, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(DistributedGradScaler, name)).parameters
            assert list(ours) == list(inspect.signature(method).parameters)
    ours = inspect.signature(DistributedGradScaler).parameters
    theirs = inspect.signature(torch.amp.GradScaler).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert [ours[name].default for name in theirs] == [parameter.default for parameter in theirs.values()]
    assert isinstance(DistributedGradScaler("cpu"), torch.amp.GradScaler)

"""The loss scale's rule is torch's, with hysteresis, a floor and a ceiling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.schema import LossScaleConfig
from launcher.precision import DynamicLossScale, NoLossScale, build_loss_scale

CPU = torch.device("cpu")
CLEAN, OVERFLOW = torch.tensor(0.0), torch.tensor(1.0)


def dynamic(**settings: Any) -> DynamicLossScale:
    return DynamicLossScale(LossScaleConfig(enabled=True, **settings), CPU)


def after(scale: DynamicLossScale, outcomes: str) -> float:
    """The scale after some steps: ``x`` for an overflow, ``.`` for a clean step."""
    for outcome in outcomes:
        scale.update(OVERFLOW if outcome == "x" else CLEAN)
    return float(scale.scale)


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 5),
    st.sampled_from([1.0, 3.0, 1024.0, 65536.0]),
    st.sampled_from([2.0, 1.5, 4.0]),
    st.sampled_from([0.5, 0.25, 0.7]),
)
def test_without_hysteresis_and_limits_the_rule_is_that_of_torch(
    overflows: list[bool], interval: int, initial: float, growth: float, backoff: float
) -> None:
    scale = dynamic(
        initial=initial,
        growth_factor=growth,
        backoff_factor=backoff,
        growth_interval=interval,
        minimum=1e-38,
        maximum=3e38,
    )
    expected, tracker = torch.tensor(initial), torch.tensor(0, dtype=torch.int32)
    for overflow in overflows:
        found_inf = OVERFLOW if overflow else CLEAN
        torch._amp_update_scale_(expected, tracker, found_inf, growth, backoff, interval)
        if not 1e-37 < float(expected) < 1e37:
            return
        scale.update(found_inf)
        assert float(scale.scale) == pytest.approx(float(expected), rel=1e-6)
        assert int(scale.growth_tracker) == int(tracker)


@pytest.mark.parametrize("outcomes", ["x", "....x...x.xx....", "........", "xxxx....xxxx....."])
def test_the_rule_is_that_of_a_whole_grad_scaler(outcomes: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    scale = dynamic(initial=64.0, growth_interval=3, minimum=1e-30, maximum=1e30)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for outcome in outcomes:
        scaler.scale(torch.zeros(()))  # makes the scale
        parameter.grad = torch.full((1,), float("inf" if outcome == "x" else "1"))
        scaler.step(optimizer)
        scaler.update()
        assert after(scale, outcome) == scaler.get_scale()
    assert int(scale.growth_tracker) == scaler.state_dict()["_growth_tracker"]


def test_hysteresis_tolerates_overflows_until_it_is_used_up() -> None:
    assert after(dynamic(initial=64.0, hysteresis=3), "xx") == 64.0
    assert after(dynamic(initial=64.0, hysteresis=3), "xxx") == 32.0
    assert after(dynamic(initial=64.0, hysteresis=3), "x.x.x") == 32.0, "clean steps do not refill it"
    assert after(dynamic(initial=64.0, hysteresis=3), "xxxx") == 16.0, "once used up, each overflow backs off"


def test_growth_refills_hysteresis() -> None:
    scale = dynamic(initial=64.0, hysteresis=2, growth_interval=2)
    assert after(scale, "x..") == 128.0
    assert after(scale, "x") == 128.0
    assert after(scale, "x") == 64.0


def test_a_tolerated_overflow_still_restarts_the_wait_for_growth() -> None:
    assert after(dynamic(initial=64.0, hysteresis=3, growth_interval=3), "..x..") == 64.0
    assert after(dynamic(initial=64.0, hysteresis=3, growth_interval=3), "..x...") == 128.0


def test_the_scale_stops_at_its_floor_and_recovers() -> None:
    scale = dynamic(initial=8.0, minimum=3.0, growth_interval=2)
    assert after(scale, "x" * 200) == 3.0
    assert after(scale, "..") == 6.0


def test_the_scale_stops_at_its_ceiling() -> None:
    scale = dynamic(initial=8.0, maximum=100.0, growth_interval=1)
    assert after(scale, "." * 300) == 100.0
    assert after(scale, "x") == 50.0


@given(st.text("x.", max_size=40), st.integers(1, 4), st.integers(1, 4))
def test_the_scale_always_stays_between_its_limits(outcomes: str, hysteresis: int, interval: int) -> None:
    scale = dynamic(initial=16.0, minimum=2.0, maximum=64.0, hysteresis=hysteresis, growth_interval=interval)
    for outcome in outcomes:
        assert 2.0 <= after(scale, outcome) <= 64.0


@given(st.text("x.", max_size=20), st.text("x.", max_size=20))
def test_a_restored_scale_goes_on_as_if_nothing_had_happened(before: str, later: str) -> None:
    settings = {"initial": 64.0, "hysteresis": 2, "growth_interval": 3}
    kept, restored = dynamic(**settings), dynamic(**settings)
    after(kept, before)
    restored.load_state_dict(kept.state_dict())
    assert restored.state_dict() == kept.state_dict()
    assert after(restored, later) == after(kept, later)
    assert restored.state_dict() == kept.state_dict()


@pytest.mark.parametrize(
    "state", [{}, {"scale": 1.0}, {"scale": 1.0, "growth_tracker": 0, "tolerance": 1, "more": 0}], ids=str
)
def test_a_state_with_missing_or_unknown_keys_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="growth_tracker"):
        dynamic().load_state_dict(state)


def test_no_scale_is_one_forever_and_has_no_state() -> None:
    scale = build_loss_scale(LossScaleConfig(enabled=False), CPU)
    assert isinstance(scale, NoLossScale)
    scale.update(OVERFLOW)
    assert float(scale.scale) == 1.0
    assert scale.state_dict() == {}
    scale.load_state_dict({})
    with pytest.raises(ValueError, match="no loss scale is in use"):
        scale.load_state_dict({"scale": 2.0})


def test_the_configuration_decides_whether_there_is_a_scale() -> None:
    scale = build_loss_scale(LossScaleConfig(enabled=True, initial=4.0), CPU)
    assert isinstance(scale, DynamicLossScale)
    assert float(scale.scale) == 4.0

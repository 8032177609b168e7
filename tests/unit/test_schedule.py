"""The learning rate follows its closed form over the applied steps, and skipped steps do not count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.schema import Decay, ScheduleConfig
from launcher.training.schedule import Schedule

CPU = torch.device("cpu")
ZERO, ONE = torch.tensor(0.0), torch.tensor(1.0)


def closed_form(decay: Decay, warmup: int, total: int, final: float, applied: int) -> float:
    if applied < warmup:
        return (applied + 1) / warmup
    if decay is Decay.constant:
        return 1.0
    progress = min(1.0, (applied - warmup) / max(1, total - warmup))
    if decay is Decay.linear:
        return 1.0 - (1.0 - final) * progress
    return final + (1.0 - final) * (1.0 + math.cos(math.pi * progress)) / 2


@given(st.sampled_from(list(Decay)), st.integers(0, 12), st.integers(1, 20), st.floats(0, 1), st.lists(st.booleans()))
def test_the_factor_is_the_closed_form_of_the_applied_steps(
    decay: Decay, warmup: int, total: int, final: float, skips: list[bool]
) -> None:
    config = ScheduleConfig(decay=decay, warmup_steps=warmup, final_fraction=final)
    schedule = Schedule(config, total, CPU)
    applied = 0
    for skipped in skips:
        factor = schedule.factor()
        assert factor.dtype == torch.float64
        assert float(factor) == pytest.approx(closed_form(decay, warmup, total, final, applied), rel=1e-12, abs=1e-15)
        schedule.advance(ONE if skipped else ZERO)
        applied += not skipped
        assert int(schedule.applied_steps) == applied


@pytest.mark.parametrize("decay", list(Decay))
def test_the_full_rate_is_reached_with_the_last_warmup_step(decay: Decay) -> None:
    schedule = Schedule(ScheduleConfig(decay=decay, warmup_steps=4), 10, CPU)
    factors = []
    for _ in range(5):
        factors.append(float(schedule.factor()))
        schedule.advance(ZERO)
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("decay", "last"), [(Decay.constant, 1.0), (Decay.linear, 0.1), (Decay.cosine, 0.1)])
def test_the_rate_ends_at_its_final_fraction_and_stays_there(decay: Decay, last: float) -> None:
    schedule = Schedule(ScheduleConfig(decay=decay, warmup_steps=2, final_fraction=0.1), 6, CPU)
    for _ in range(6):
        schedule.advance(ZERO)
    assert float(schedule.factor()) == pytest.approx(last)
    schedule.advance(ZERO)
    assert float(schedule.factor()) == pytest.approx(last)


def test_half_way_is_half_for_cosine_and_linear() -> None:
    for decay in (Decay.linear, Decay.cosine):
        schedule = Schedule(ScheduleConfig(decay=decay), 10, CPU)
        for _ in range(5):
            schedule.advance(ZERO)
        assert float(schedule.factor()) == pytest.approx(0.5)

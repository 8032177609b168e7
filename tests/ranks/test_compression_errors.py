"""What encoding has lost comes back; a step that was skipped leaves no trace; nothing non-finite stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from launcher.compression import Wire, attach
from tests.ranks import reducing
from tests.ranks.processes import Ranks
from tests.ranks.reducing import Given, backward, drawn, exact_mean, gradients, replicated, told

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

SHAPES = ((300,), (5, 7), (64, 33), (1000,))
STEPS = 24
SPOILT = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def whole(ddp: torch.nn.Module) -> Tensor:
    return torch.cat([each.flatten().double() for each in gradients(ddp) if each is not None])


def repeated(rank: int, world_size: int, options: dict[str, Any], scales: list[float]) -> list[float]:
    """The largest error of the mean over the first k steps with one gradient, of what one step may be off by."""
    ddp = replicated(Given(SHAPES), 0.008)
    wire = attach(ddp, **options)
    exact = torch.cat([each.flatten() for each in exact_mean(world_size, 0, SHAPES)])
    ranks = [drawn(other, 0, SHAPES) for other in range(world_size)]
    allowed = torch.cat([each.flatten() for each in reducing.bound(options["codec"], world_size, ranks)])
    total, errors = torch.zeros_like(exact), []
    for step in range(STEPS):
        scale = scales[step % len(scales)]
        ddp.zero_grad()
        with told(wire, scale=scale):
            backward(ddp, drawn(rank, 0, SHAPES), scale)
        total += whole(ddp) / scale
        errors.append(((total / (step + 1) - exact).abs() / allowed).max().item())
    return errors


@pytest.mark.parametrize(("world_size", "codec"), [(2, "int8"), (3, "int8"), (2, "fp16"), (2, "bf16")])
@pytest.mark.parametrize("scales", [[1.0], [1.0, 256.0, 2.0, 1024.0]], ids=["no loss scale", "a loss scale that moves"])
def test_what_is_lost_comes_back(pools: dict[int, Ranks], world_size: int, codec: str, scales: list[float]) -> None:
    """The sum over k steps is off by what is still kept, at most what one step loses: the mean by 1/k of it."""
    options = {"codec": codec, "error_feedback": True}
    for errors in pools[world_size].run(repeated, world_size, options, scales):
        # what is encoded is larger by what was kept; FP32 sums
        assert all(error <= 1.1 / steps + 1e-3 for steps, error in enumerate(errors, start=1))


def test_without_error_feedback_it_does_not(pools: dict[int, Ranks]) -> None:
    for errors in pools[2].run(repeated, 2, {"codec": "int8", "error_feedback": False}, [1.0]):
        assert errors[-1] == pytest.approx(errors[0], rel=1e-3)
        assert errors[-1] > 3 * 1.1 / STEPS


def state(wire: Wire) -> dict[str, list[float]]:
    """What is kept for the next step; steps are counted whether they are applied or not."""
    return {key: value.flatten().tolist() for key, value in wire.state_dict().items() if not key.endswith(".steps")}


def spoilt_on_one(rank: int, world_size: int, options: dict[str, Any], value: float) -> list[bool]:
    """Whether all gradients of the tensor are non-finite where they should be, and whether the errors are untouched."""
    ddp = replicated(Given(SHAPES), 0.008)
    wire = attach(ddp, **options)
    for step in range(3):
        ddp.zero_grad()
        with told(wire):
            backward(ddp, drawn(rank, step, SHAPES))
    before = state(wire)
    given = drawn(rank, 3, SHAPES)
    if rank == world_size - 1:
        given[2][50, 3] = value
    ddp.zero_grad()
    with told(wire, found_inf=1.0):
        backward(ddp, given)
    spoilt = not gradients(ddp)[2][50, 3].isfinite()  # type: ignore[index]
    untouched = state(wire) == before
    ddp.zero_grad()
    with told(wire):
        backward(ddp, drawn(rank, 4, SHAPES))
    recovered = bool(whole(ddp).isfinite().all()) and all(each.isfinite().all() for each in wire.state_dict().values())
    return [spoilt, untouched, recovered, any(any(values) for key, values in before.items() if "weight/" not in key)]


@pytest.mark.parametrize("value", SPOILT)
@pytest.mark.parametrize("codec", ["int8", "fp16", "powersgd"])
def test_what_is_not_finite_on_one_rank_is_so_on_all_and_is_forgotten(
    pools: dict[int, Ranks], codec: str, value: str
) -> None:
    options = {"codec": codec, "error_feedback": True} | ({"start_step": 2} if codec == "powersgd" else {})
    for spoilt, untouched, recovered, keeps in pools[3].run(spoilt_on_one, 3, options, SPOILT[value]):
        assert spoilt
        assert untouched
        assert recovered
        assert keeps, "there was something to lose"


def spoilt_in_a_plain_loop(rank: int, options: dict[str, Any]) -> list[bool]:
    """Nobody tells the wire: whether each step's gradients came back finite."""
    ddp = replicated(Given(SHAPES), 0.008)
    attach(ddp, **options)
    finite = []
    for step in range(6):
        given = drawn(rank, step, SHAPES)
        if rank == 0 and step == 3:
            given[2][50, 3] = math.inf
        ddp.zero_grad()
        backward(ddp, given)
        finite.append(bool(whole(ddp).isfinite().all()))
    return finite


@pytest.mark.parametrize("codec", ["int8", "powersgd"])
def test_a_loop_that_tells_nothing_recovers_too(pools: dict[int, Ranks], codec: str) -> None:
    options = {"codec": codec} | ({"start_step": 2} if codec == "powersgd" else {})
    for finite in pools[2].run(spoilt_in_a_plain_loop, options):
        assert finite == [True, True, True, False, True, True]


# PowerSGD

MATRICES = ((40, 30), (1,), (20,), (16, 24))


def of_low_rank(rank: int) -> list[Tensor]:
    """Matrices of rank 1, whose mean over four ranks has rank 4 at most."""
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.outer(torch.randn(shape[0], generator=generator), torch.randn(shape[1], generator=generator))
        if len(shape) == 2
        else torch.randn(shape, generator=generator)
        for shape in MATRICES
    ]


def low_rank_steps(rank: int, world_size: int, kinds: str, torchs_own: bool = False) -> list[float]:
    """Steps that are good (g), zero (z) or spoilt (s): the largest error of each mean."""
    ddp: DistributedDataParallel = replicated(Given(MATRICES))
    wire = None
    if torchs_own:
        ddp.register_comm_hook(PowerSGDState(None, 4, start_powerSGD_iter=2), powerSGD_hook)
    else:
        wire = attach(ddp, "powersgd", rank=4, start_step=2)
    exact = torch.cat(
        [
            sum(each.double() for each in parts).flatten() / world_size  # type: ignore[union-attr]
            for parts in zip(*(of_low_rank(other) for other in range(world_size)), strict=True)
        ]
    )
    errors = []
    for kind in kinds:
        given = [each * (kind != "z") for each in of_low_rank(rank)]
        if kind == "s" and rank == 1:
            given[0][3, 4] = math.inf
        ddp.zero_grad()
        if wire is not None:
            wire.begin(torch.ones(()))
        backward(ddp, given)
        if wire is not None:
            wire.conclude(torch.tensor(float(kind == "s")))
        errors.append((whole(ddp) - exact * (kind != "z")).abs().max().item())
    return errors


def test_powersgd_starts_late_and_is_right_for_matrices_of_low_rank(pools: dict[int, Ranks]) -> None:
    for errors in pools[3].run(low_rank_steps, 3, "gggggg"):
        assert max(errors[:2]) < 1e-6
        assert max(errors[2:]) < 1e-4


def test_powersgd_gets_over_a_step_that_is_not_finite_where_torchs_does_not(pools: dict[int, Ranks]) -> None:
    for errors in pools[2].run(low_rank_steps, 2, "ggggsgg"):
        assert not math.isfinite(errors[4])
        assert max(errors[:4] + errors[5:]) < 1e-4
    for errors in pools[2].run(low_rank_steps, 2, "ggggsgg", True):
        assert not any(math.isfinite(error) for error in errors[4:])


def test_powersgd_gets_over_gradients_that_are_zero_at_first(pools: dict[int, Ranks]) -> None:
    for errors in pools[2].run(low_rank_steps, 2, "zzzzzggg"):
        assert max(errors[:5]) < 1e-6
        assert max(errors[-2:]) < 1e-4


def measured(rank: int, error_feedback: bool) -> float:
    """What PowerSGD of rank 1 says it has lost in a step, relative."""
    ddp = replicated(Given(MATRICES))
    wire = attach(ddp, "powersgd", rank=1, start_step=2, error_feedback=error_feedback)
    for _ in range(3):
        ddp.zero_grad()
        wire.take_lost()
        with told(wire, measures=True):
            backward(ddp, of_low_rank(rank))
    lost, encoded = wire.take_lost().tolist()
    return math.sqrt(lost / encoded)


@pytest.mark.parametrize("error_feedback", [True, False])
def test_powersgd_measures_what_it_loses(pools: dict[int, Ranks], error_feedback: bool) -> None:
    for relative in pools[2].run(measured, error_feedback):
        assert 0.1 < relative < 1


def measured_encoding(rank: int, options: dict[str, object], ranks_per_host: int | None) -> float:
    """What a codec says that it has lost in a step, relative; it keeps no errors."""
    shapes = ((300,), (64, 33))
    ddp = replicated(Given(shapes))
    with reducing.hosts(rank, ranks_per_host):
        wire = attach(ddp, **options)
    with told(wire, measures=True):
        backward(ddp, drawn(rank, 0, shapes))
    lost, encoded = wire.take_lost().tolist()
    ddp.zero_grad()
    with told(wire):
        backward(ddp, drawn(rank, 1, shapes))
    assert wire.take_lost().tolist() == [0, 0], "a step that does not measure adds nothing"
    return math.sqrt(lost / encoded)


@pytest.mark.parametrize("ranks_per_host", [None, 2])
@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"codec": "fp16"}, 2.0**-13, 2.0**-11),
        ({"codec": "fp16", "accumulate": "wire"}, 2.0**-13, 2.0**-11),
        ({"codec": "bf16", "accumulate": "wire"}, 2.0**-10, 2.0**-8),
        ({"codec": "int8", "error_feedback": False}, 0.002, 0.02),
    ],
    ids=["fp16", "fp16 wire", "bf16 wire", "int8"],
)
def test_what_encoding_loses_is_measured_where_no_errors_are_kept(
    pools: dict[int, Ranks], options: dict[str, object], least: float, most: float, ranks_per_host: int | None
) -> None:
    for relative in pools[4].run(measured_encoding, options, ranks_per_host):
        assert least < relative < most

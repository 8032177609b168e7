"""Errors that are saved on one layout and taken up on another: what the next mean gains is the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.compression import Wire, attach
from tests.ranks import reducing
from tests.ranks.processes import Ranks
from tests.ranks.reducing import Given, backward, drawn, gradients, replicated, sharded, told

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

SHAPES = ((300,), (5, 7), (1,), (64, 33), (1000,))
INT8 = {"codec": "int8"}
Saved = list[dict[str, list[float]]]


def build(rank: int, layout: tuple[Any, ...], options: dict[str, Any]) -> tuple[nn.Module, Wire]:
    """("ddp", bucket size[, ranks of a host]) or ("fsdp", mesh[, ranks of a host])."""
    kind, size, *ranks_per_host = layout
    with reducing.hosts(rank, ranks_per_host[0] if ranks_per_host else None):
        model = replicated(Given(SHAPES), size) if kind == "ddp" else sharded(Given(SHAPES), size)
        return model, attach(model, **options)


def step(model: nn.Module, wire: Wire, given: list[Tensor], tells: bool = True) -> list[Tensor]:
    model.zero_grad()
    if not tells:
        backward(model, given)
        return [each.double() for each in gradients(model) if each is not None]
    with told(wire, scale=8.0):
        backward(model, given, 8.0)
    return [each.double() / 8.0 for each in gradients(model) if each is not None]


def save(rank: int, layout: tuple[Any, ...], options: dict[str, Any], tells: bool = True) -> dict[str, list[float]]:
    model, wire = build(rank, layout, options)
    for number in range(3):
        step(model, wire, drawn(rank, number, SHAPES), tells)
    return {key: value.flatten().tolist() for key, value in wire.state_dict().items()}


def owed(saved: Saved) -> dict[tuple[str, int], float]:
    """What the errors of all ranks add to the mean of each element."""
    found: dict[tuple[str, int], float] = {}
    for state in saved:
        for key, values in state.items():
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("/")
            if not start.isdecimal():
                continue
            (weight,) = state[f"weight/{kind}"]
            for index, value in enumerate(values, start=int(start)):
                found[name, index] = found.get((name, index), 0.0) + weight * value
    return found


def load(rank: int, layout: tuple[Any, ...], options: dict[str, Any], saved: Saved) -> list[Any]:
    """What this rank then has, and what a step without gradients gives."""
    model, wire = build(rank, layout, options)
    tensors = [{key: torch.tensor(values) for key, values in state.items()} for state in saved]
    wire.load_state_dict(tensors.__getitem__, len(saved))
    taken = {key: value.flatten().tolist() for key, value in wire.state_dict().items()}
    paid = step(model, wire, [torch.zeros(shape) for shape in SHAPES])
    return [taken, [each.flatten().tolist() for each in paid]]


DDP, FSDP, HSDP = ("ddp", 0.008), ("fsdp", (4,)), ("fsdp", (2, 2))
ALL = {"codec": "int8", "axis": "all"}


@pytest.mark.parametrize(
    ("ranks_before", "before", "ranks_after", "after", "options"),
    [
        (2, DDP, 3, DDP, INT8),
        (2, DDP, 2, ("ddp", 25.0), INT8),
        (4, ("ddp", 0.008, 2), 2, DDP, INT8),
        (4, FSDP, 2, ("fsdp", (2,)), INT8),
        (2, DDP, 4, FSDP, INT8),
        (4, ("fsdp", (4,), 2), 3, DDP, INT8),
        (2, DDP, 4, HSDP, ALL),
        (4, HSDP, 3, ("fsdp", (3,)), ALL),
        (2, DDP, 1, DDP, INT8),
    ],
    ids=lambda value: str(value),
)
def test_errors_move_to_another_layout(
    pools: dict[int, Ranks],
    ranks_before: int,
    before: tuple[Any, ...],
    ranks_after: int,
    after: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    saved = pools[ranks_before].run(save, before, {**options, "axis": None} if before[0] == "ddp" else options)
    owed_before = owed(saved)
    assert max(map(abs, owed_before.values())) > 1e-3
    assert len(owed_before) == sum(math.prod(shape) for shape in SHAPES)
    found = pools[ranks_after].run(load, after, {**options, "axis": None} if after[0] == "ddp" else options, saved)
    if ranks_after == 1:
        return  # nothing is encoded: nothing is owed
    owed_after = owed([taken for taken, _ in found])
    assert owed_after == pytest.approx(owed_before, rel=1e-5, abs=1e-9)
    largest = max(map(abs, owed_before.values()))
    for _, paid in found:
        for index, values in enumerate(paid):
            expected = [owed_before[f"parts.{index}", element] for element in range(len(values))]
            assert values == pytest.approx(expected, abs=2 * largest / 200)


def continued(rank: int, layout: tuple[Any, ...], options: dict[str, Any], saved: Saved, tells: bool) -> bool:
    """Whether a run that takes up its own goes on to the last bit as one that was never stopped."""
    model, wire = build(rank, layout, options)
    for number in range(3):
        step(model, wire, drawn(rank, number, SHAPES), tells)
    other, other_wire = build(rank, layout, options)
    tensors = [{key: torch.tensor(values) for key, values in state.items()} for state in saved]
    other_wire.load_state_dict(tensors.__getitem__, len(saved))
    same = True
    for number in range(3, 6):
        given = drawn(rank, number, SHAPES)
        pairs = zip(step(model, wire, given, tells), step(other, other_wire, given, tells), strict=True)
        same &= all(torch.equal(one, two) for one, two in pairs)
    return same


@pytest.mark.parametrize(
    ("ranks", "layout", "options", "tells"),
    [
        (2, DDP, INT8, True),
        (2, DDP, INT8, False),
        (4, ("ddp", 0.008, 2), INT8, True),
        (4, FSDP, INT8, True),
        (4, FSDP, INT8, False),
        (4, HSDP, ALL, True),
        (2, DDP, {"codec": "powersgd", "start_step": 2}, True),
        (2, DDP, {"codec": "powersgd", "start_step": 2}, False),
        (4, HSDP, {"codec": "powersgd", "start_step": 2}, True),
    ],
    ids=lambda value: str(value),
)
def test_a_run_that_takes_up_its_own_goes_on_to_the_last_bit(
    pools: dict[int, Ranks], ranks: int, layout: tuple[Any, ...], options: dict[str, Any], tells: bool
) -> None:
    saved = pools[ranks].run(save, layout, options, tells)
    assert all(pools[ranks].run(continued, layout, options, saved, tells))


def low_rank_on_others(rank: int, layout: tuple[Any, ...], saved: Saved) -> list[Any]:
    """PowerSGD that takes up what another number of ranks has saved: its steps, and digests of three means."""
    model, wire = build(rank, layout, LOW_RANK)
    tensors = [{key: torch.tensor(values) for key, values in state.items()} for state in saved]
    wire.load_state_dict(tensors.__getitem__, len(saved))
    digests = [reducing.digest(step(model, wire, drawn(rank, number, SHAPES))) for number in range(3, 6)]
    return [wire.state_dict()["replica.steps"].item(), *digests]


LOW_RANK = {"codec": "powersgd", "start_step": 2}


@pytest.mark.parametrize(
    ("before", "after"), [((2, DDP), (3, DDP)), ((3, DDP), (2, DDP)), ((2, ("fsdp", (2, 1))), (4, ("fsdp", (4, 1))))]
)
def test_powersgd_goes_on_at_the_same_step_on_another_number_of_ranks(
    pools: dict[int, Ranks], before: tuple[int, Any], after: tuple[int, Any]
) -> None:
    """A rank that has no state of its own, and begins anew, would send what the others do not expect."""
    saved = pools[before[0]].run(save, before[1], LOW_RANK)
    found = pools[after[0]].run(low_rank_on_others, after[1], saved)
    assert found == [found[0]] * after[0]
    assert found[0][0] == 6

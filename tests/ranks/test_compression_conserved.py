"""Nothing is lost for good: means that came back, and errors that are still owed, add up to the true means.

Whatever parameters were there, whichever steps were skipped, and on whatever layout the errors have been since.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.compression import Wire, attach
from tests.ranks import reducing
from tests.ranks.processes import Ranks
from tests.ranks.reducing import Given, backward, gradients, replicated, sharded, told

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

SHAPES = ((37, 29), (1,), (37, 29), (300,), (2, 40))
STEPS = 9
CODECS: dict[str, dict[str, Any]] = {
    "int8": {"codec": "int8", "block_size": 12},
    "fp16": {"codec": "fp16", "error_feedback": True},
    "powersgd": {"codec": "powersgd", "start_step": 2, "rank": 2},
}


def owed(wire: Wire) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """What all ranks would save, and what their errors add to the mean of each parameter."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, {key: value.clone() for key, value in wire.state_dict().items()})
    totals = [torch.zeros(math.prod(shape), dtype=torch.float64) for shape in SHAPES]
    for state in states:
        for key, values in state.items():
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("/")
            if start.isdecimal():
                part = totals[int(name.rpartition(".")[2])][int(start) :][: values.numel()]
                part += values.double() * state[f"weight/{kind}"]
    return states, [total.view(shape) for total, shape in zip(totals, SHAPES, strict=True)]


def largest_difference(rank: int, name: str, layouts: list[tuple[Any, ...]], ranks_per_host: int | None) -> float:
    """Steps on one layout after the other, what is kept taken along: what is missing, of the largest gradient."""
    chosen, world_size = random.Random(len(layouts)), dist.get_world_size()
    due = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    states: list[dict[str, Tensor]] = []
    largest, difference = 0.0, 0.0
    for number, (kind, size, *axis) in enumerate(layouts):
        with reducing.hosts(rank, ranks_per_host), reducing.small_sizes():
            is_ddp = kind == "ddp"
            given = Given(SHAPES)
            model = replicated(given, size, find_unused_parameters=True) if is_ddp else sharded(given, size)
            wire = attach(model, **CODECS[name], **({"axis": axis[0]} if axis else {}))
        if states:
            wire.load_state_dict(states.__getitem__, world_size)
        for step in range(STEPS):
            scale, is_skipped = chosen.choice([1.0, 64.0]), chosen.random() < 0.2
            away = {index for index in range(1, len(SHAPES)) if chosen.random() < 0.4}
            ranks = [reducing.drawn(other, 100 * number + step, SHAPES) for other in range(world_size)]
            model.zero_grad()
            with told(wire, found_inf=float(is_skipped), scale=scale):
                backward(model, [None if index in away else ranks[rank][index] for index in range(len(SHAPES))], scale)
            for index, found in enumerate(gradients(model)):
                if found is not None and not is_skipped:
                    exact = sum(each[index].double() for each in ranks) / world_size
                    largest = max(largest, exact.abs().max().item())  # type: ignore[union-attr]
                    due[index] += exact - found.double() / scale
        states, kept = owed(wire)
        difference = max((one - two).abs().max().item() for one, two in zip(due, kept, strict=True))
        assert max(each.abs().max().item() for each in kept) > 0
    return difference / largest


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    ("world_size", "layouts", "ranks_per_host"),
    [
        (3, [("ddp", 0.002), ("hsdp", (3, 1)), ("hsdp", (3, 1)), ("ddp", 25.0)], None),
        (4, [("hsdp", (2, 2)), ("ddp", 0.002), ("hsdp", (4, 1))], 2),
        (4, [("hsdp", (2, 2), "all"), ("fsdp", (4,)), ("fsdp", (4,)), ("hsdp", (1, 4), "all")], None),
    ],
    ids=["ddp and copies", "hosts", "shards"],
)
def test_what_came_back_and_what_is_owed_is_what_was_due(
    pools: dict[int, Ranks], world_size: int, layouts: list[tuple[Any, ...]], ranks_per_host: int | None, name: str
) -> None:
    if name == "powersgd" and any(kind == "fsdp" for kind, *_ in layouts):
        return  # is refused
    for difference in pools[world_size].run(largest_difference, name, layouts, ranks_per_host):
        assert difference < 1e-4


def kept_of_unused(rank: int, name: str) -> tuple[bool, bool, bool]:
    """In a loop that tells nothing: whether errors changed of a parameter used by none, by one rank, by all."""
    ddp = replicated(Given(SHAPES), 0.002, find_unused_parameters=True)
    wire = attach(ddp, **CODECS[name])
    for step in range(3):
        ddp.zero_grad()
        backward(ddp, reducing.drawn(rank, step, SHAPES))
    before, _ = owed(wire)
    ddp.zero_grad()
    given: list[Tensor | None] = list(reducing.drawn(rank, 3, SHAPES))
    given[0], given[2] = None, given[2] if rank == 0 else None
    backward(ddp, given)
    after, _ = owed(wire)

    def changed(index: int) -> bool:
        keys = [(one, key) for one, state in enumerate(before) for key in state if f"/parts.{index}/" in key]
        return any(not torch.equal(before[one][key], after[one][key]) for one, key in keys)

    return changed(0), changed(2), changed(4)


@pytest.mark.parametrize("name", CODECS)
def test_what_is_kept_for_a_parameter_that_no_rank_has_used_stays(pools: dict[int, Ranks], name: str) -> None:
    assert pools[2].run(kept_of_unused, name) == [(False, True, True)] * 2


def frozen_since(rank: int, is_attached: bool) -> list[float]:
    """What is kept when a parameter was frozen after DDP had counted it: before the codec came, or after."""
    ddp = replicated(Given(SHAPES), 25.0, find_unused_parameters=True)
    wire = attach(ddp, "int8") if is_attached else None
    ddp.module.parts[1].requires_grad_(False)
    wire = wire or attach(ddp, "int8")
    for step in range(2):
        given: list[Tensor | None] = list(reducing.drawn(rank, step, SHAPES))
        given[1] = None
        ddp.zero_grad()
        with told(wire):
            backward(ddp, given)
    _, kept = owed(wire)
    return [each.abs().max().item() for each in kept]


@pytest.mark.parametrize("is_attached", [True, False])
def test_a_parameter_that_is_frozen_later_confuses_nobody(pools: dict[int, Ranks], is_attached: bool) -> None:
    for kept in pools[2].run(frozen_since, is_attached):
        assert [each > 0 for each in kept] == [True, False, True, True, True]

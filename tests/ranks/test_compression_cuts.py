"""Codecs where FSDP2 cuts otherwise: parameters that take turns, another dimension, tensor parallelism, some ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from launcher.compression import Wire, attach
from launcher.errors import ConfigurationError
from tests.ranks import reducing
from tests.ranks.processes import Ranks
from tests.ranks.reducing import Given, backward, drawn, exact_mean, gradients, sharded, told

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

EQUAL = ((20, 8), (20, 8), (3,))
STEPS = 24


def taking_turns(rank: int, mesh: tuple[int, ...], tells: bool) -> list[float]:
    """The first two parameters have a gradient in turns, always the same: the largest error of the mean over the steps
    of each so far, of what one step may be off by. State is asked for in between."""
    model = sharded(Given(EQUAL), mesh)
    wire = attach(model, "int8", axis="all")
    world_size = math.prod(mesh)
    factors = (1.0, 1000.0, 1.0)  # an error at the wrong parameter is seen

    def given(other: int) -> list[Tensor]:
        return [each * factor for each, factor in zip(drawn(other, 0, EQUAL), factors, strict=True)]

    allowed = [
        most.max() for index in range(2) for most in reducing.bound("int8", world_size, turn(given, world_size, index))
    ]
    totals, errors = [torch.zeros(20, 8, dtype=torch.float64) for _ in range(2)], []
    for step in range(STEPS):
        turns = step % 2
        own: list[Tensor | None] = list(given(rank))
        own[1 - turns] = None
        model.zero_grad()
        if tells:
            with told(wire):
                backward(model, own)
        else:
            backward(model, own)
        found = gradients(model)[turns]
        assert found is not None
        totals[turns] += found
        exact = exact_mean(world_size, 0, EQUAL)[turns] * factors[turns]
        errors.append(((totals[turns] / (step // 2 + 1) - exact).abs().max() / allowed[turns]).item())
        if step % 5 == 0:
            kept = {key for key, values in wire.state_dict().items() if values.numel() and values.abs().max() > 0}
            assert any("parts.0" in key for key in kept)
            assert step == 0 or any("parts.1" in key for key in kept), "what is away keeps its own"
    return errors


def turn(given: Any, world_size: int, index: int) -> list[list[Tensor]]:
    """One of the parameters, of all ranks."""
    return [[given(other)[index]] for other in range(world_size)]


@pytest.mark.parametrize(
    ("mesh", "tells", "factor"), [((2,), True, 1.1), ((3,), False, 1.1), ((2, 2), True, 2.2)], ids=str
)
def test_two_of_one_size_that_take_turns_keep_their_own_errors(
    pools: dict[int, Ranks], mesh: tuple[int, ...], tells: bool, factor: float
) -> None:
    """What is lost comes back to the same parameter: the mean over k steps is off by 1/k of what one step loses."""
    for errors in pools[math.prod(mesh)].run(taking_turns, mesh, tells):
        assert all(error <= factor / (step // 2 + 1) + 1e-3 for step, error in enumerate(errors)), errors


COLUMNS = ((12, 24), (24,))


def by_columns(mesh: DeviceMesh, columns: bool) -> Given:
    model = Given(COLUMNS)
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda each: Shard(1 if columns and each.ndim > 1 else 0))
    return model


def shared_out(saved: list[dict[str, Tensor]], wire: Wire) -> None:
    """Load as if there had been one more rank, which had nothing."""
    wire.load_state_dict(lambda rank: saved[rank] if rank < len(saved) else {}, len(saved) + 1)


def all_states(wire: Wire) -> list[dict[str, Tensor]]:
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, {key: value.clone() for key, value in wire.state_dict().items()})
    return states


def paid_in_columns(rank: int, columns_after: bool) -> list[float]:
    """Errors of shards of columns, taken up by the same or by shards of rows: what a step without gradients gives, less
    what was owed, of the largest of that."""
    mesh = init_device_mesh("cpu", (2,))
    model = by_columns(mesh, True)
    wire = attach(model, "int8")
    with told(wire):
        backward(model, drawn(rank, 0, COLUMNS))
    pairs = zip(exact_mean(2, 0, COLUMNS), gradients(model), strict=True)
    owed = [exact - found.double() for exact, found in pairs if found is not None]
    other = by_columns(mesh, columns_after)
    other_wire = attach(other, "int8", block_size=4)
    shared_out(all_states(wire), other_wire)
    with told(other_wire):
        backward(other, [torch.zeros(shape) for shape in COLUMNS])
    paid = [each.double() for each in gradients(other) if each is not None]
    return [((one - two).abs().max() / one.abs().max()).item() for one, two in zip(owed, paid, strict=True)]


def test_errors_of_columns_come_back_to_columns_and_to_nothing_else(pools: dict[int, Ranks]) -> None:
    for off in pools[2].run(paid_in_columns, True):
        assert max(off) < 0.01
    for columns, vector in pools[2].run(paid_in_columns, False):
        assert columns == 1.0, "nothing was paid, and nothing to the wrong elements"
        assert vector < 0.01


def in_two_ways(rank: int) -> list[Any]:
    """Rows of a matrix on two ranks, its shards on two: whether errors that are shared out come back to their own, and
    what attach says to codecs for replicas, which there are none of."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        return model

    model = build()
    wire = attach(model, "int8")
    with told(wire):
        inputs = torch.randn(8, 32, generator=torch.Generator().manual_seed(rank // 2))
        model(inputs).square().sum().backward()
    states = all_states(wire)
    other = attach(build(), "int8")
    shared_out(states, other)
    kept = {key: value for key, value in other.state_dict().items() if value.numel() and "weight/" not in key}
    same = [torch.allclose(value, states[rank][key], atol=1e-9) for key, value in kept.items()]
    refusals = []
    for options in ({"codec": "powersgd"}, {"codec": "int8", "axis": "replica"}):
        with pytest.raises(ConfigurationError) as refusal:
            attach(build(), **options)
        refusals.append(str(refusal.value))
    return [all(same), max(value.abs().max().item() for value in kept.values()), *refusals]


def test_tensor_parallelism_is_no_replica_and_has_errors_of_its_own(pools: dict[int, Ranks]) -> None:
    for same, largest, low_rank, replica in pools[4].run(in_two_ways):
        assert same
        assert largest > 0
        assert "only rows of them" in low_rank
        assert "there is one replica" in replica


def taken_up_by_a_pair(rank: int) -> bool:
    """Two pairs of ranks, each with shards of a model of its own; one pair alone loads what it has saved."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "shard"))["shard"]

    def build() -> tuple[nn.Module, Wire]:
        model = Given(COLUMNS)
        fully_shard(model, mesh=mesh)
        return model, attach(model, "int8")

    model, wire = build()
    with told(wire):
        backward(model, drawn(rank, 0, COLUMNS))
    states = all_states(wire)[rank // 2 * 2 :]
    _, other = build()
    if rank < 2:
        return True
    other.load_state_dict(lambda saved_rank: states[saved_rank], 2)
    return all(torch.equal(value, wire.state_dict()[key]) for key, value in other.state_dict().items())


def test_shards_on_some_of_the_ranks_take_up_their_own_state(pools: dict[int, Ranks]) -> None:
    assert all(pools[4].run(taken_up_by_a_pair))


def goes_on_without_some(rank: int, mesh: tuple[int, ...], options: dict[str, Any]) -> bool:
    """A parameter never has a gradient: whether who takes up the state goes on as the other does, to the last bit."""
    shapes = ((40, 16), (40, 16), (30,))

    def build() -> tuple[Given, Wire]:
        model = sharded(Given(shapes), mesh)
        return model, attach(model, **options)

    def step(model: Given, wire: Wire, number: int) -> list[Tensor | None]:
        own: list[Tensor | None] = list(drawn(rank, number, shapes))
        own[1] = None
        model.zero_grad()
        with told(wire):
            backward(model, own)
        return gradients(model)

    model, wire = build()
    for number in range(4):
        step(model, wire, number)
    other, other_wire = build()
    other_wire.load_state_dict(all_states(wire).__getitem__, math.prod(mesh))
    return all(
        (one is None and two is None) or (one is not None and two is not None and torch.equal(one, two))
        for number in range(4, 7)
        for one, two in zip(step(model, wire, number), step(other, other_wire, number), strict=True)
    )


@pytest.mark.parametrize(
    ("mesh", "options"),
    [((2, 2), {"codec": "int8", "axis": "all"}), ((2, 1), {"codec": "powersgd", "start_step": 2})],
    ids=str,
)
def test_a_run_in_which_some_are_never_used_goes_on_to_the_last_bit(
    pools: dict[int, Ranks], mesh: tuple[int, ...], options: dict[str, Any]
) -> None:
    assert all(pools[math.prod(mesh)].run(goes_on_without_some, mesh, options))


def refused_on_two_meshes(rank: int) -> str:
    pairs = FSDPMeshInfo(init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "shard"))["shard"], shard_mesh_dim=0)
    model = Given(COLUMNS)
    expert = model.parts[0]

    def place(parameter: nn.Parameter) -> Any:
        return ShardPlacementResult(Shard(0), pairs) if parameter is expert else Shard(0)

    fully_shard(model, mesh=init_device_mesh("cpu", (4,)), shard_placement_fn=place)
    with pytest.raises(ConfigurationError) as refusal:
        attach(model, "int8")
    return str(refusal.value)


def test_parameters_of_one_module_on_two_meshes_are_refused(pools: dict[int, Ranks]) -> None:
    for message in pools[4].run(refused_on_two_meshes):
        assert message.startswith("The parameters of the model are on several meshes")

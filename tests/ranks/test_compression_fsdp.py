"""Codecs under FSDP2: shards of one mean, replicas that agree, and errors that move to another layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from launcher.compression import Wire, attach, attach_sharded
from launcher.config.schema import CompressionConfig
from launcher.errors import ConfigurationError
from tests.ranks import reducing
from tests.ranks.processes import Ranks
from tests.ranks.reducing import Given, backward, digest, drawn, exact_mean, gradients, sharded, told

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

SHAPES = ((300,), (5, 7), (1,), (64, 33), (3, 2), (1000,))
"""Rows that do not divide by the ranks, and fewer of them than ranks."""
FROZEN = 4
CODECS: dict[str, dict[str, Any]] = {
    "fp16": {"codec": "fp16"},
    "fp16 wire": {"codec": "fp16", "accumulate": "wire"},
    "bf16": {"codec": "bf16"},
    "int8": {"codec": "int8"},
    "int8 of 4": {"codec": "int8", "block_size": 4, "error_feedback": False},
}


def assert_close(found: list[Tensor | None], name: str, world_size: int, step: int, factor: float = 1.0) -> None:
    allowed = reducing.bound(name, world_size, [drawn(rank, step, SHAPES) for rank in range(world_size)])
    for index, (value, mean, most) in enumerate(zip(found, exact_mean(world_size, step, SHAPES), allowed, strict=True)):
        if value is None:
            assert index == FROZEN
        else:
            assert ((value.double() - mean).abs() <= factor * most).all(), (name, index)


def mean_in_shards(
    rank: int, mesh: tuple[int, ...], name: str, options: dict[str, Any], reshard: bool, ranks_per_host: int | None
) -> str:
    world_size = math.prod(mesh)
    with reducing.hosts(rank, ranks_per_host):
        model = sharded(Given(SHAPES, frozen=[FROZEN]), mesh, reshard)
        attach(model, **CODECS[name], **options)
    backward(model, drawn(rank, 0, SHAPES))
    # over both axes of a mesh: twice there and back
    assert_close(gradients(model), name, world_size, 0, factor=2.0 if len(mesh) == 2 else 1.0)
    model.zero_grad()
    backward(model, drawn(rank, 1, SHAPES))
    return digest(gradients(model))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    ("mesh", "options", "reshard", "ranks_per_host"),
    [
        ((1,), {}, True, None),
        ((2,), {}, True, None),
        ((2,), {}, False, None),
        ((3,), {}, True, None),
        ((4,), {}, True, None),
        ((4,), {}, True, 2),
        ((2, 2), {}, True, None),
        ((2, 2), {"axis": "replica"}, False, None),
        ((2, 2), {"axis": "all"}, True, None),
        ((4, 1), {"axis": "all"}, True, 2),
        ((1, 4), {"axis": "all"}, True, 2),
        ((1, 2), {"axis": "replica"}, True, None),
    ],
    ids=lambda value: str(value),
)
def test_shards_are_those_of_one_mean(
    pools: dict[int, Ranks],
    mesh: tuple[int, ...],
    options: dict[str, Any],
    reshard: bool,
    ranks_per_host: int | None,
    name: str,
) -> None:
    pool = pools[math.prod(mesh)]
    assert len(set(pool.run(mean_in_shards, mesh, name, options, reshard, ranks_per_host))) == 1


def low_rank_between_replicas(rank: int, mesh: tuple[int, int], spoilt_step: int) -> list[float]:
    """Matrices of rank 1 on each rank, PowerSGD between the replicas: the largest error of each step's mean."""
    shapes = ((64, 24), (30,), (16, 32))
    world_size = math.prod(mesh)

    def given(other: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(other % mesh[1] + 10 * (other // mesh[1]))
        return [
            torch.outer(torch.randn(shape[0], generator=generator), torch.randn(shape[1], generator=generator))
            if len(shape) == 2
            else torch.randn(shape, generator=generator)
            for shape in shapes
        ]

    model = sharded(Given(shapes), mesh)
    wire = attach(model, "powersgd", rank=4, start_step=2)
    errors = []
    for step in range(6):
        own = given(rank)
        if step == spoilt_step and rank == 1:
            own[0][3, 4] = math.nan
        model.zero_grad()
        with told(wire, found_inf=float(step == spoilt_step)):
            backward(model, own)
        ranks = [given(other) for other in range(world_size)]
        means = [sum(each.double() for each in parts) / world_size for parts in zip(*ranks, strict=True)]
        differences = [
            (found.double() - mean).abs().max()  # type: ignore[union-attr]
            for found, mean in zip(gradients(model), means, strict=True)
        ]
        errors.append(torch.stack(differences).max().item())
    return errors


@pytest.mark.parametrize("mesh", [(2, 2), (4, 1), (2, 1)])
def test_powersgd_goes_between_replicas(pools: dict[int, Ranks], mesh: tuple[int, int]) -> None:
    for errors in pools[math.prod(mesh)].run(low_rank_between_replicas, mesh, 4):
        assert max(errors[:2]) < 1e-6
        assert not math.isfinite(errors[4])
        assert max(errors[2:4] + errors[5:]) < 1e-4


def refused(rank: int, mesh: tuple[int, ...], options: dict[str, Any]) -> str:
    model = sharded(Given(SHAPES), mesh)
    try:
        attach(model, **options)
    except ConfigurationError as error:
        return str(error)
    return "accepted"


def test_what_cannot_go_with_shards_is_refused(pools: dict[int, Ranks]) -> None:
    for message in pools[2].run(refused, (2,), {"codec": "powersgd"}):
        assert "only rows of them" in message
    for message in pools[2].run(refused, (2,), {"codec": "int8", "axis": "replica"}):
        assert "there is one replica" in message
    for message in pools[2].run(refused, (2, 1), {"codec": "powersgd", "axis": "all"}):
        assert "compression.axis=replica" in message


class Blocks(nn.Module):
    """Two modules that FSDP2 reduces apart, and what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.rest = Given(SHAPES), Given(SHAPES), nn.Parameter(torch.zeros(5))

    def forward(self, first: Any, second: Any) -> Tensor:
        return self.first(first) + self.second(second) + self.rest.sum()


def unused_in_turns(rank: int, world_size: int, name: str) -> list[bool]:
    """Parameters that have a gradient in some steps only; whether each step's mean was right and finite."""
    model = Blocks()
    mesh = init_device_mesh("cpu", (world_size,))
    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh)
    wire = attach(model, **CODECS[name])
    right = []
    for step in range(6):
        first: list[Tensor | None] = list(drawn(rank, step, SHAPES))
        second: list[Tensor | None] = list(drawn(rank, step, SHAPES))
        missing = {0: (), 1: (1, 3), 2: (1, 3), 3: (0,)}.get(step, ())
        for index in missing:
            first[index] = None
        model.zero_grad()
        with told(wire):
            model(first, second).backward()
        for given in (model.first, model.second):
            found = gradients(given)
            means = exact_mean(world_size, step, SHAPES)
            ranks = [drawn(other, step, SHAPES) for other in range(world_size)]
            for index, (value, mean, most) in enumerate(
                zip(found, means, reducing.bound(name, world_size, ranks), strict=True)
            ):
                if value is None:
                    right.append(given is model.first and index in missing)
                else:
                    # with the errors of a step before, which its own values bound
                    right.append(bool(((value.double() - mean).abs() <= 3 * most).all()))
    return right


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_parameters_may_lack_a_gradient_in_some_steps(pools: dict[int, Ranks], name: str) -> None:
    for right in pools[3].run(unused_in_turns, 3, name):
        assert all(right)


def errors_where_some_are_never_used(rank: int) -> dict[str, float]:
    """A plain loop, in which the first part gets no gradient: the largest error that is kept of each other."""
    model = sharded(Given(SHAPES), (2,))
    wire = attach(model, "int8")
    for step in range(4):
        given: list[Tensor | None] = list(drawn(rank, step, SHAPES))
        given[0] = None
        model.zero_grad()
        backward(model, given)
    model.zero_grad()
    state = {key: value for key, value in wire.state_dict().items() if not key.startswith("weight")}
    return {key: value.abs().max().item() for key, value in state.items() if value.numel()}


def test_a_plain_loop_keeps_errors_where_some_parameters_are_never_used(pools: dict[int, Ranks]) -> None:
    for errors in pools[2].run(errors_where_some_are_never_used):
        assert {"parts.0" in key for key in errors} == {True, False}
        assert all(error == 0 if "parts.0" in key else 0 < error < 0.1 for key, error in errors.items())


def spoilt_in_a_plain_loop(rank: int, options: dict[str, Any], spoilt: float) -> list[bool]:
    """Nobody tells the wire: whether each step's gradients came back finite. Rank 1 spoils what rank 0 owns."""
    model = sharded(Given(SHAPES), (2,))
    attach(model, **options)
    finite = []
    for step in range(6):
        given = drawn(rank, step, SHAPES)
        if rank == 1 and step == 3:
            given[0][5] = spoilt
        model.zero_grad()
        backward(model, given)
        finite.append(all(each.isfinite().all() for each in gradients(model) if each is not None))
    return finite


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 1e8])
@pytest.mark.parametrize("codec", ["int8", "fp16"])
def test_a_loop_that_tells_nothing_recovers(pools: dict[int, Ranks], codec: str, spoilt: float) -> None:
    overflows = codec == "fp16" or not math.isfinite(spoilt)
    for finite in pools[2].run(spoilt_in_a_plain_loop, {"codec": codec, "error_feedback": True}, spoilt):
        assert finite == [True, True, True, not overflows, True, True]


def repeated(rank: int, mesh: tuple[int, ...], options: dict[str, Any]) -> list[float]:
    """The largest error of the mean over the first k steps with one gradient."""
    model = sharded(Given(SHAPES), mesh)
    wire = attach(model, **options)
    world_size = math.prod(mesh)
    exact = torch.cat([each.flatten() for each in exact_mean(world_size, 0, SHAPES)])
    ranks = [drawn(other, 0, SHAPES) for other in range(world_size)]
    allowed = torch.cat([each.flatten() for each in reducing.bound("int8", world_size, ranks)])
    total, errors = torch.zeros_like(exact), []
    for step in range(16):
        scale = (1.0, 512.0)[step % 2]
        model.zero_grad()
        with told(wire, scale=scale):
            backward(model, drawn(rank, 0, SHAPES), scale)
        total += torch.cat([each.flatten().double() for each in gradients(model) if each is not None]) / scale
        errors.append(((total / (step + 1) - exact).abs() / allowed).max().item())
    return errors


@pytest.mark.parametrize(("mesh", "factor"), [((3,), 1.1), ((2, 2), 2.2)])
def test_what_is_lost_comes_back_to_shards_too(pools: dict[int, Ranks], mesh: tuple[int, ...], factor: float) -> None:
    options = {"codec": "int8", "axis": "all"}
    for errors in pools[math.prod(mesh)].run(repeated, mesh, options):
        assert all(error <= factor / steps + 1e-3 for steps, error in enumerate(errors, start=1))


def bytes_sent(rank: int, world_size: int) -> list[int]:
    """Of a step on 36864 elements, whole blocks for each rank: none, FP16 and int8."""
    found = []
    for options in ({"codec": "fp16"}, {"codec": "int8", "error_feedback": False}):
        model = sharded(Given(((96, 384),)), (world_size,))
        wire: Wire = attach(model, **options)
        for step in range(2):
            wire.take_bytes()
            backward(model, drawn(rank, step, ((96, 384),)))
        found.append(wire.take_bytes())
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_shard_is_sent_once_and_nothing_comes_back(pools: dict[int, Ranks], world_size: int) -> None:
    shares = (world_size - 1) * 96 * 384 // world_size
    sent = pools[world_size].run(bytes_sent, world_size)
    assert sent == [[2 * shares, shares + 4 * shares // 128]] * world_size


def bytes_of_fp32(rank: int, mesh: tuple[int, int]) -> int:
    model, wire = sharded(Given(((96, 384),)), mesh), Wire(torch.device("cpu"))
    attach_sharded(model, CompressionConfig(), wire)
    backward(model, drawn(rank, 0, ((96, 384),)))
    return wire.take_bytes()


@pytest.mark.parametrize(("mesh", "share"), [((2, 1), 1), ((1, 2), 1 / 2), ((2, 2), 1 / 2 + 1 / 2)])
def test_fp32_is_counted_on_both_axes(pools: dict[int, Ranks], mesh: tuple[int, int], share: float) -> None:
    """A shard is sent to its owner once, and there and back between the replicas."""
    assert pools[math.prod(mesh)].run(bytes_of_fp32, mesh) == [4 * 96 * 384 * share] * math.prod(mesh)

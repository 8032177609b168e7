"""What does not change from step to step: buckets, buffers, bytes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from launcher.compression import Wire, attach, attach_replicated
from launcher.compression.channel import Channel
from launcher.compression.ddp import settle_buckets
from launcher.compression.layout import Layout
from launcher.compression.links import Team
from launcher.config.schema import Accumulate, Codec, CompressionConfig
from tests.ranks import reducing
from tests.ranks.processes import Ranks
from tests.ranks.reducing import Given, backward, drawn, exact_mean, gradients, replicated

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

SHAPES = ((300,), (5, 7), (), (64, 33), (1000,))


Steps = list[dict[int, list[str]]]


def see_buckets(ddp: DistributedDataParallel) -> Steps:
    """Which parameters are in which bucket, in the last of the steps that are returned."""
    names = {parameter: name for name, parameter in ddp.module.named_parameters()}
    steps: Steps = [{}]

    def see(state, bucket):  # DDP wants annotations that are types, or none
        steps[-1][bucket.index()] = [names[each] for each in bucket.parameters()]
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, see)
    return steps


def buckets(rank: int, settles: bool, unused: bool) -> Steps:
    """Of three steps; with a step of nothing before them if they are settled."""
    ddp = replicated(Given(SHAPES), 0.008, find_unused_parameters=unused)
    steps = see_buckets(ddp)
    if settles:
        settle_buckets(ddp)
        assert all(each.grad is None for each in ddp.parameters())
        steps[:] = [{}]
    for step in range(3):
        backward(ddp, drawn(rank, step, SHAPES))
        steps.append({})
    return steps[:-1]


@pytest.mark.parametrize("unused", [False, True])
def test_buckets_are_settled_before_the_first_step(pools: dict[int, Ranks], unused: bool) -> None:
    """What notices a change of torch's private calls: DDP as it comes has others after its first step."""
    as_it_comes = pools[2].run(buckets, False, unused)[0]
    settled = pools[2].run(buckets, True, unused)[0]
    assert settled[0] == settled[1] == settled[2]
    assert len(settled[0]) > 1
    assert sorted(name for names in settled[0].values() for name in names) == [
        f"parts.{index}" for index in range(len(SHAPES))
    ]
    if not unused:
        assert as_it_comes[0] != as_it_comes[1] == settled[0]


def memories(rank: int) -> list[bool]:
    """Whether the errors have their place before the first step, and keep it."""
    ddp = replicated(Given(SHAPES), 0.008)
    wire = attach(ddp, "int8")
    before = [id(residue.feedback) for residue in wire.residues]
    for step in range(3):
        backward(ddp, drawn(rank, step, SHAPES))
    return [bool(before), [id(residue.feedback) for residue in wire.residues] == before]


def test_errors_have_their_place_from_the_start(pools: dict[int, Ranks]) -> None:
    assert pools[2].run(memories) == [[True, True]] * 2


def attached_late(rank: int, num_before: int) -> float:
    """To a model with gradients already, whose buckets DDP makes anew after its first step, or after some backward
    passes: the largest error."""
    ddp = replicated(Given(SHAPES), 0.008)
    for step in range(num_before):
        backward(ddp, drawn(rank, step, SHAPES))
        ddp.zero_grad()
    if not num_before:
        for part in ddp.parameters():
            part.grad = torch.ones_like(part)
    assert attach(ddp, "int8").residues, "a saved state finds its place"
    assert num_before or all((part.grad == 1).all() for part in ddp.parameters()), "they are nobody else's to change"
    worst = 0.0
    for step in range(4):
        ddp.zero_grad()
        backward(ddp, drawn(rank, step, SHAPES))
        for found, mean in zip(gradients(ddp), exact_mean(2, step, SHAPES), strict=True):
            assert found is not None
            worst = max(worst, (found.double() - mean).abs().max().item())
    return worst


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_attached_to_a_model_that_has_gradients_it_is_right_too(pools: dict[int, Ranks], num_before: int) -> None:
    largest = max(max(each.abs().max().item() for each in drawn(rank, 3, SHAPES)) for rank in range(2))
    # two encodings, each with the errors of the step before
    assert max(pools[2].run(attached_late, num_before)) < 4 * 1.5 * largest / 254


CONFIGS = {
    "fp16": CompressionConfig(codec=Codec.fp16),
    "fp16 wire": CompressionConfig(codec=Codec.fp16, accumulate=Accumulate.wire),
    "bf16": CompressionConfig(codec=Codec.bf16),
    "int8": CompressionConfig(codec=Codec.int8, error_feedback=False),
    "int8 with error feedback": CompressionConfig(codec=Codec.int8, error_feedback=True),
}


_NUMBER = 8
"""Bytes of a number that Python hands to torch."""


def allocated(rank: int, name: str, ranks_per_host: int | None) -> list[int]:
    """Bytes of each tensor that three reductions make, after two that are not counted."""
    device = torch.device("cpu")
    flat = torch.randn(10_000)
    layout = Layout.of_bucket([("whole", flat.numel())])
    with reducing.small_sizes(), reducing.hosts(rank, ranks_per_host):
        wire = Wire(device)
        channel = Channel(Team(dist.group.WORLD, device), CONFIGS[name], wire, "test")
    found: list[int] = []
    scale, applied = torch.ones(()), torch.zeros(())
    for counts in (False, False, True):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            for _ in range(3):
                wire.begin(scale)
                channel.run_mean(0, flat, layout)
                wire.conclude(applied)
        if counts:
            events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
            found = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > _NUMBER]
    return found


@pytest.mark.parametrize(("world_size", "ranks_per_host"), [(3, None), (4, 2)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_no_step_makes_a_tensor(
    pools: dict[int, Ranks], name: str, world_size: int, ranks_per_host: int | None
) -> None:
    assert pools[world_size].run(allocated, name, ranks_per_host) == [[]] * world_size


def most_allocated(rank: int, ranks_per_host: int | None) -> int:
    """Bytes of all tensors that the first reduction of a small tensor makes."""
    device, flat = torch.device("cpu"), torch.randn(10_000)
    with reducing.hosts(rank, ranks_per_host):
        channel = Channel(Team(dist.group.WORLD, device), CONFIGS["int8"], Wire(device), "test")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        channel.run_mean(0, flat, None)
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("ranks_per_host", [None, 2])
def test_buffers_are_no_larger_than_tensors_need(pools: dict[int, Ranks], ranks_per_host: int | None) -> None:
    """Room for whole messages, for each of many ranks, would be more than the model."""
    portions = 2 * 4 * (1 << 17)
    assert max(pools[4].run(most_allocated, ranks_per_host)) < 3 * portions + 6 * 4 * 10_000 * 4


def bytes_sent(rank: int, config: CompressionConfig) -> int:
    """In a step on 36864 elements, whole blocks for each of 2, 3 and 4 ranks."""
    ddp = replicated(Given(((96, 384),)))
    wire = Wire(torch.device("cpu"))
    attach_replicated(ddp, config, wire)
    for step in range(2):
        wire.take_bytes()
        wire.begin(torch.ones(()))
        backward(ddp, drawn(rank, step, ((96, 384),)))
        wire.conclude(torch.zeros(()))
    return wire.take_bytes()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_are_those_of_the_encoded_values(pools: dict[int, Ranks], world_size: int) -> None:
    """There and back, each rank sends all but its own share: 2 (N - 1) / N of the tensor."""
    numel = 96 * 384
    for config, each in [
        (CompressionConfig(), 4),
        *((config, 2) for name, config in CONFIGS.items() if "int8" not in name),
        (CONFIGS["int8"], 1 + 4 / 128),
        (CompressionConfig(codec=Codec.int8, block_size=32), 1 + 4 / 32),
    ]:
        sent = pools[world_size].run(bytes_sent, config)
        assert sent == [2 * (world_size - 1) * numel * each // world_size] * world_size


def test_one_rank_sends_nothing(pools: dict[int, Ranks]) -> None:
    assert pools[1].run(bytes_sent, CONFIGS["int8"]) == [0]


def low_rank_bytes(rank: int) -> list[int]:
    ddp = replicated(Given(((96, 384), (50,))))
    wire = attach(ddp, "powersgd", rank=4, start_step=2)
    sent = []
    for step in range(4):
        backward(ddp, drawn(rank, step, ((96, 384), (50,))))
        sent.append(wire.take_bytes())
    return sent


def test_powersgd_sends_two_thin_matrices(pools: dict[int, Ranks]) -> None:
    whole, thin = 4 * (96 * 384 + 50), 4 * (4 * (96 + 384) + 50)
    assert pools[2].run(low_rank_bytes) == [[whole, whole, thin, thin]] * 2

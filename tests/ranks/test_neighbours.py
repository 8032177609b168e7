"""Ranks of one host: what they hand each other through memory is what they would send, and nothing of it stays."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.compression import attach
from launcher.compression.channel import Channel
from launcher.compression.layout import Layout
from launcher.compression.links import Team
from launcher.compression.neighbours import Messages, SharedMemory
from launcher.compression.wire import Wire
from launcher.config.schema import Accumulate, Codec, CompressionConfig
from tests.ranks import reducing
from tests.ranks.processes import Ranks
from tests.ranks.reducing import digest

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

_NUMEL = 96 * 384
_STEPS = 6
_CONFIGS = {
    "fp16": CompressionConfig(codec=Codec.fp16),
    "fp16 wire": CompressionConfig(codec=Codec.fp16, accumulate=Accumulate.wire),
    "int8": CompressionConfig(codec=Codec.int8, error_feedback=True),
}


@contextmanager
def _without_memory(rank: int, reason: str) -> Iterator[None]:
    """One rank cannot have it, or others cannot see it."""
    if rank != 1 or reason == "":
        yield
        return
    what = {
        "no memfd": mock.patch.object(os, "memfd_create", side_effect=OSError("no memory")),
        "no room": mock.patch.object(os, "truncate", side_effect=OSError("too large")),
        "no such process": mock.patch.object(os, "getpid", return_value=2**22 + 1),
        "another process": mock.patch.object(os, "getpid", os.getppid),
    }[reason]
    with what:
        yield


def _channel(rank: int, config: str, ranks_per_host: int, reason: str) -> tuple[Channel, Wire]:
    device = torch.device("cpu")
    wire = Wire(device)
    with reducing.hosts(rank, ranks_per_host), reducing.small_sizes(), _without_memory(rank, reason):
        return Channel(Team(dist.group.WORLD, device), _CONFIGS[config], wire, "test"), wire


def _late(rank: int, step: int) -> None:
    """Each rank at another time."""
    time.sleep(0.002 * ((rank + step) % 3))


def means(rank: int, config: str, ranks_per_host: int, reason: str) -> tuple[str, str, int]:
    """Which way, a digest of the means of some steps, and the bytes of the last one."""
    channel, wire = _channel(rank, config, ranks_per_host, reason)
    layout, found = Layout.of_bucket([("p", _NUMEL)]), list[Tensor]()
    for step in range(_STEPS):
        flat = torch.randn(_NUMEL, generator=torch.Generator().manual_seed(100 * step + rank))
        wire.take_bytes()
        wire.begin(torch.ones(()))
        _late(rank, step)
        channel.run_mean(0, flat, layout)
        wire.conclude(torch.zeros(()))
        found.append(flat)
    return type(channel._exchange._neighbours).__name__, digest(found), wire.take_bytes()


def shards(rank: int, config: str, ranks_per_host: int, reason: str) -> tuple[str, str]:
    """The same for a reduce-scatter, with a tensor of another size in between; a digest of this rank's shards."""
    channel, wire = _channel(rank, config, ranks_per_host, reason)
    found = []
    for step in range(_STEPS):
        numel = _NUMEL // (1 + step % 2)
        source = torch.randn(numel, generator=torch.Generator().manual_seed(100 * step + rank))
        shard = torch.empty(numel // dist.get_world_size())
        wire.begin(torch.ones(()))
        _late(rank, step)
        channel.run_shard_mean(numel, source, shard, Layout.of_bucket([("p", numel)]))
        assert channel.pipeline.is_idle, "the source is the caller's again: nothing of it is on its way"
        source.fill_(torch.nan)
        wire.conclude(torch.zeros(()))
        found.append(shard)
    return type(channel._exchange._neighbours).__name__, digest(found)


@pytest.mark.parametrize("reason", ["no memfd", "no room", "no such process", "another process"])
@pytest.mark.parametrize("config", _CONFIGS)
def test_where_one_rank_has_no_memory_all_send_and_get_the_same_bits(
    pools: dict[int, Ranks], config: str, reason: str
) -> None:
    through_memory = pools[4].run(means, config, 2, "")
    sent = pools[4].run(means, config, 2, reason)
    assert {way for way, _, _ in through_memory} == {SharedMemory.__name__}
    assert {way for way, _, _ in sent} == {Messages.__name__}
    assert len({bits for _, bits, _ in [*through_memory, *sent]}) == 1
    assert [count for _, _, count in through_memory] == [count for _, _, count in sent], "what is handed over counts"


@pytest.mark.parametrize("config", ["fp16", "int8"])
def test_a_reduce_scatter_never_reads_what_the_next_chunk_has_written(pools: dict[int, Ranks], config: str) -> None:
    through_memory = pools[4].run(shards, config, 2, "")
    sent = pools[4].run(shards, config, 2, "no memfd")
    assert {way for way, _ in through_memory} == {SharedMemory.__name__}
    assert [bits for _, bits in through_memory] == [bits for _, bits in sent]


@pytest.mark.parametrize(("config", "each"), [("fp16", 2), ("fp16 wire", 2), ("int8", 1 + 4 / 128)])
def test_ranks_of_two_hosts_hand_over_whole_tensors_in_fp32_and_send_halves_of_them_encoded(
    pools: dict[int, Ranks], config: str, each: float
) -> None:
    """Of n values on 2 hosts of 2 ranks: n/2 in FP32 and n/2 encoded to the neighbour, n/4 there and n/4 back."""
    encoded = _NUMEL * each
    expected = 4 * _NUMEL / 2 + encoded / 2 + 2 * encoded / 4
    assert [count for _, _, count in pools[4].run(means, config, 2, "")] == [expected] * 4


class _Watched:
    """A process group that notes what is posted."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.posted: list[str] = []

    def recv(self, *args: Any) -> Any:
        self.posted.append("receive")
        return self._group.recv(*args)

    def send(self, *args: Any) -> Any:
        self.posted.append("send")
        return self._group.send(*args)


def posted(rank: int, ranks_per_host: int, reason: str, gathers: bool) -> list[str]:
    """By one chunk, in order."""
    channel, _ = _channel(rank, "fp16", ranks_per_host, reason)
    size = dist.get_world_size()
    source, watched = torch.randn(64 * size), _Watched(channel.team.group)
    with mock.patch.object(channel.team, "group", watched):
        if gathers:
            channel.run_mean(0, source, None)
        else:
            channel.run_shard_mean(0, source, torch.empty(64), None)
    return watched.posted


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize(("ranks_per_host", "reason"), [(2, ""), (2, "no memfd"), (1, "")])
def test_a_chunk_is_ready_for_all_that_is_to_come_before_it_sends(
    pools: dict[int, Ranks], ranks_per_host: int, reason: str, gathers: bool
) -> None:
    """gloo's senders begin when they have heard of it, and that news waits behind what is under way."""
    for entries in pools[4].run(posted, ranks_per_host, reason, gathers):
        count = len(entries) // 2
        assert entries == ["receive"] * count + ["send"] * count
        # With a neighbour: what it gives, a message for each of two hosts or a word of it; and its means, or (through
        # memory) a word that it has read.
        given, told = (2, gathers) if reason else (1, 1)
        assert count == (given + told) * (ranks_per_host - 1) + (4 // ranks_per_host - 1) * (1 + gathers)


def may_start_a_second(rank: int, ranks_per_host: int) -> bool:
    """Whether rank 0, which has started a chunk of which the others know nothing, would start another."""
    channel, _ = _channel(rank, "fp16", ranks_per_host, "")
    source = torch.randn(64 * dist.get_world_size())
    if rank == 0:
        channel.pipeline.start(next(channel.mean(0, source, None)))
        found = channel.pipeline.should_start
        dist.barrier()
        channel.pipeline.run([])
        return found
    dist.barrier()
    channel.run_mean(0, source, None)
    return False


def test_where_ranks_share_a_host_chunks_start_one_by_one(pools: dict[int, Ranks]) -> None:
    assert pools[4].run(may_start_a_second, 2)[0] is False
    assert pools[4].run(may_start_a_second, 1)[0] is True


def left_open(rank: int) -> tuple[set[str], set[str]]:
    """Files of this process, and of the memory file system, that a channel in use has added."""

    def seen() -> tuple[set[str], set[str]]:
        folder = Path("/proc/self/fd")
        files = {os.readlink(folder / name) for name in os.listdir(folder) if (folder / name).is_symlink()}
        return {name for name in files if "memfd" in name}, set(os.listdir("/dev/shm"))

    files, names = seen()
    channel, _ = _channel(rank, "int8", 2, "")
    assert isinstance(channel._exchange._neighbours, SharedMemory)
    channel.run_mean(0, torch.randn(_NUMEL), None)
    files_then, names_then = seen()
    return files_then - files, names_then - names


def test_no_file_and_no_name_is_left(pools: dict[int, Ranks]) -> None:
    assert pools[4].run(left_open) == [(set(), set())] * 4


def left_of_models(rank: int, kind: str) -> list[tuple[int, int]]:
    """Regions of the memory, and threads, while a model with a codec trains, and when it is gone."""
    found = []

    def count() -> None:
        gc.collect()
        regions = Path("/proc/self/maps").read_text().count("memfd:tminus-gradients")
        found.append((regions, threading.active_count()))

    count()
    for _ in range(2):
        given = reducing.Given(((64, 40), (300,)))
        ddp = {"find_unused_parameters": kind == "ddp with unused"}
        model = reducing.sharded(given, (4,)) if kind == "fsdp" else reducing.replicated(given, **ddp)
        codec = {"codec": "fp16", "accumulate": "wire"} if kind == "ddp wire" else {"codec": "int8"}
        with reducing.hosts(rank, 2):
            wire = attach(model, **codec)
        for step in range(2):
            reducing.backward(model, reducing.drawn(rank, step, ((64, 40), (300,))))
        assert wire.take_bytes()
        count()
        dist.barrier()
        del given, model, wire
        count()
    return found


@pytest.mark.parametrize("kind", ["ddp", "ddp with unused", "ddp wire", "fsdp"])
def test_memory_and_threads_go_with_the_model(pools: dict[int, Ranks], kind: str) -> None:
    for before, first, gone, second, gone_too in pools[4].run(left_of_models, kind):
        assert first[0] == second[0] == 2
        assert first[1] > before[1]
        assert gone == gone_too == (0, before[1])


@pytest.fixture(scope="module")
def six() -> Iterator[Ranks]:
    with Ranks(6) as ranks:
        yield ranks


@pytest.mark.parametrize("ranks_per_host", [2, 3])
@pytest.mark.parametrize("config", _CONFIGS)
def test_so_it_is_on_three_hosts_and_with_three_ranks_on_each(six: Ranks, config: str, ranks_per_host: int) -> None:
    for function in (means, shards):
        through_memory, sent = (six.run(function, config, ranks_per_host, reason) for reason in ("", "no memfd"))
        assert {way for way, *_ in through_memory} == {SharedMemory.__name__}
        assert [found for _, *found in through_memory] == [found for _, *found in sent]

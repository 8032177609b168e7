"""What ranks hand each other comes out right in whatever order messages arrive and ranks go on.

Real exchanges, pipelines and memory of one host's ranks; only what is between ranks is of this process alone, so that
a test can choose the order, and hold messages back for as long as anything else can happen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from launcher.compression import neighbours
from launcher.compression.codecs import BlockInt8, Codec, Half
from launcher.compression.exchange import Exchange, Sizes
from launcher.compression.links import Expected, Grid, Parcel, Pending
from launcher.compression.pipeline import Chunk, Flight, Pipeline
from launcher.compression.reduction import Reduction
from launcher.compression.terms import StepTerms

CPU = torch.device("cpu")
_Way = tuple[Codec, torch.dtype | None]
WAYS: list[_Way] = [(Half(torch.float16), None), (Half(torch.float16), torch.float16), (BlockInt8(4), None)]
"""A codec, and the type in which the backend sums over hosts, if it does."""
_SLOW = 0.1
"""The part of messages that are held back."""


class _NotYetError(Exception):
    pass


class _Message:
    """One end of it."""

    def __init__(self, content: Tensor, is_slow: bool) -> None:
        self.content = content
        self.is_slow = is_slow
        self.has_come = False

    def wait(self) -> None:
        if not self.has_come:
            raise _NotYetError


@dataclass(frozen=True, eq=False)
class _Meeting:
    """All ends of a message or of a sum."""

    ends: Sequence[_Message]
    sums: bool

    def happen(self) -> None:
        if self.sums:
            total = self.ends[0].content.clone()
            for end in self.ends[1:]:
                total += end.content
        else:
            total = self.ends[0].content
        for end in self.ends:
            end.content.copy_(total)
            end.has_come = True


class _Link(NamedTuple):
    sender: int
    receiver: int
    tag: int


class _Network:
    """Ranks of one process, and all that is on its way between them."""

    def __init__(self, hosts: int, ranks_per_host: int, seed: int) -> None:
        self.random = random.Random(seed)
        names = [f"host{rank // ranks_per_host}" for rank in range(hosts * ranks_per_host)]
        self.teams: list[Any] = [
            _Team(self, Grid.of_hosts(names, rank), rank, len(names)) for rank in range(len(names))
        ]
        self.memory: dict[int, Tensor] = {}
        self.waiting: list[tuple[Flight, Callable[[Flight], None]]] = []
        self._open: dict[tuple[str, _Link], _Message] = {}
        self._sums: dict[tuple[int, ...], dict[int, list[_Message]]] = {}
        self._meetings: list[_Meeting] = []

    def post(self, end: str, link: _Link, content: Tensor) -> Any:
        message = _Message(content, self.random.random() < _SLOW)
        assert (end, link) not in self._open, "one message at most is under way for two ranks and a tag"
        other = self._open.pop(("receive" if end == "send" else "send", link), None)
        if other is None:
            self._open[end, link] = message
        else:
            self._meetings.append(_Meeting([message, other] if end == "send" else [other, message], sums=False))
        return message

    def add_up(self, members: Sequence[int], rank: int, values: Tensor) -> Any:
        """One rank's part in a sum over ``members``, whose sums are matched by the order in which they come."""
        message = _Message(values, self.random.random() < _SLOW)
        queues = self._sums.setdefault(tuple(members), {member: [] for member in members})
        queues[rank].append(message)
        if all(queues.values()):
            self._meetings.append(_Meeting([queue.pop(0) for queue in queues.values()], sums=True))
        return message

    def share_memory(self, team: Any, nbytes: int) -> list[Tensor]:
        """What nobody has written is not finite."""
        ranks = team.grid.ranks[team.grid.host]
        return [self.memory.setdefault(rank, torch.full((nbytes,), 255, dtype=torch.uint8)) for rank in ranks]

    def run(self, ranks: Sequence[_Rank]) -> None:
        """To the end, one event after another."""
        speeds = [self.random.choice([1, 1, 5, 50]) for _ in ranks]
        while True:
            able = [rank for rank in ranks if rank.can_act]
            complete = [each for each in self._meetings if not each.ends[0].is_slow]
            ready = [each for each in self.waiting if _has_come(each[0])]
            if not (able or complete or ready):
                complete = self._meetings
            kinds = [kind for kind in (able, complete, ready) if kind]
            if not kinds:
                break
            kind = self.random.choice(kinds)
            if kind is able:
                min(able, key=lambda rank: self.random.random() * speeds[ranks.index(rank)]).act()
            elif kind is complete:
                meeting = self.random.choice(complete)
                self._meetings.remove(meeting)
                meeting.happen()
            else:
                flight, then = each = self.random.choice(ready)
                self.waiting.remove(each)
                then(flight)
        assert all(rank.is_done for rank in ranks), "ranks wait for each other"
        assert not self._open
        assert not self.waiting
        assert not any(ends for queues in self._sums.values() for ends in queues.values())


def _has_come(flight: Flight) -> bool:
    try:
        flight.wait()
    except _NotYetError:
        return False
    return True


class _Team:
    """A team as an exchange knows it."""

    def __init__(self, network: _Network, grid: Grid, rank: int, size: int) -> None:
        self.network, self.grid, self.rank, self.size = network, grid, rank, size
        self.device = CPU
        self.bytes_sent = 0

    def expect(self, receive: Sequence[Parcel]) -> Expected:
        parcels = [each for each in receive if each.content.numel()]
        post = self.network.post
        return Expected(parcels, [post("receive", _Link(p.peer, self.rank, p.tag), p.content) for p in parcels])

    def exchange(self, expected: Expected, send: Sequence[Parcel], counts: bool = True) -> Pending:
        post = self.network.post
        parcels = [each for each in send if each.content.numel()]
        sent = [post("send", _Link(self.rank, p.peer, p.tag), p.content) for p in parcels]
        return Pending(expected.works, sent)

    def connect_column(self) -> list[int]:
        return [row[self.grid.place] for row in self.grid.ranks]

    def all_reduce(self, values: Tensor, column: list[int]) -> Pending:
        return Pending([self.network.add_up(column, self.rank, values)], [])


class _Rank:
    """Runs chunks as a pipeline does, an action at a time."""

    def __init__(self, pipeline: Pipeline[Any], chunks: Iterator[Chunk]) -> None:
        self._pipeline = pipeline
        self._actions = self._act(chunks)
        self._waits = False
        self.is_done = False

    @property
    def can_act(self) -> bool:
        return not self.is_done and not (self._waits and self._pipeline.inbox.empty())

    def act(self) -> None:
        self.is_done = next(self._actions, True)

    def _act(self, chunks: Iterator[Chunk]) -> Iterator[bool]:
        for chunk in chunks:
            while not self._pipeline.should_start:
                yield from self._advance()
            self._pipeline.start(chunk)
            yield False
        while not self._pipeline.is_idle:
            yield from self._advance()

    def _advance(self) -> Iterator[bool]:
        self._waits = True
        while self._pipeline.inbox.empty():
            yield False
        self._waits = False
        self._pipeline.advance(self._pipeline.inbox.get_nowait())
        yield False


@dataclass
class _Task:
    """One reduction: the mean of ``numel`` values, or a shard of ``numel`` of it for each rank."""

    numel: int
    gathers: bool


def _reduced(
    monkeypatch: pytest.MonkeyPatch, hosts: int, per_host: int, way: _Way, tasks: Sequence[_Task], seed: int | None
) -> list[list[Tensor]]:
    """Each rank's results; ``seed``: of the order, through memory; None: messages, and one order."""
    codec, sums_over_hosts = way
    network = _Network(hosts, per_host, seed or 0)
    monkeypatch.setattr(Flight, "wait_aside", lambda flight, then: network.waiting.append((flight, then)))
    share_memory = (lambda team, nbytes: None) if seed is None else network.share_memory
    monkeypatch.setattr(neighbours, "share_memory", share_memory)
    num_slots = 3 if seed is None else network.random.choice([1, 2, 3])
    sizes = Sizes(message_bytes=codec.encoded_bytes(8), portion=4, num_slots=num_slots, sum_bytes=64)
    exchanges = [Exchange(team, codec, sizes, sums_over_hosts) for team in network.teams]
    found: list[list[Tensor]] = [[] for _ in exchanges]

    def chunks(rank: int) -> Iterator[Chunk]:
        for number, task in enumerate(tasks):
            numel = task.numel if task.gathers else task.numel * len(exchanges)
            source = torch.randn(numel, generator=torch.Generator().manual_seed(100 * number + rank))
            target = source if task.gathers else torch.empty(task.numel)
            shard = exchanges[rank].shard_size(numel) if task.gathers else task.numel
            yield from exchanges[rank].chunks(Reduction(source, target, shard, task.gathers, StepTerms(CPU)))
            found[rank].append(target)

    network.run([_Rank(exchange.pipeline, chunks(rank)) for rank, exchange in enumerate(exchanges)])
    return found


@pytest.mark.parametrize(("hosts", "per_host"), [(2, 2), (3, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("way", WAYS, ids=["fp16", "fp16 wire", "int8"])
@pytest.mark.parametrize("kind", ["means", "shards", "mixed"])
def test_results_are_the_same_bits_in_whatever_order_things_happen(
    monkeypatch: pytest.MonkeyPatch, hosts: int, per_host: int, way: _Way, kind: str
) -> None:
    numbers = [150, 40, 1] if kind == "means" else [35, 12, 1] if kind == "shards" else [90, 21, 5, 17]
    gathers = {"means": [True] * 3, "shards": [False] * 3, "mixed": [True, False, True, False]}[kind]
    tasks = [_Task(numel, each) for numel, each in zip(numbers, gathers, strict=True)]
    expected = _reduced(monkeypatch, hosts, per_host, way, tasks, None)
    for number, task in enumerate(tasks):
        if task.gathers:
            assert all(torch.equal(results[number], expected[0][number]) for results in expected)
    for seed in range(1, 9):
        found = _reduced(monkeypatch, hosts, per_host, way, tasks, seed)
        for ours, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)), f"seed {seed}"

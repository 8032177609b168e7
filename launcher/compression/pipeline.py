"""Many chunks under way at once, so that the link is busy while the arithmetic is done.

A chunk is a generator: it yields whatever it waits for, and is resumed when that has arrived. A pipeline takes
whichever chunk can go on, and starts the next one when none can and the slot (a set of buffers) whose turn it is is
free; where ranks share cores, only when the one before has gone on. Slots take turns: a rank that starts chunk n has
ended chunk n - (number of slots) and all before it, from which neighbours know what they may overwrite.

On CPUs a chunk waits only for its own messages, and starts only after older ones: if it waited for a younger one, two
ranks that have started different chunks could wait for each other for ever. Each slot has a thread that waits for what
its chunk has under way, and says so. On CUDA waiting is only enqueued: chunks go on in the order in which they have
sent, the same on every rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from launcher.compression.links import Pending
from launcher.compression.servants import serve

__all__ = ["Chunk", "Course", "Flight", "Pipeline"]

Slot = TypeVar("Slot")
Course = Generator[Pending, None, Sequence[Pending]]
"""Yields what it waits for; returns all that it has sent, once its result is there."""
Chunk = Callable[[Any], Course]
"""Called with its slot."""
_STOP_SECONDS = 1.0
"""For one that still waits for a peer when the interpreter ends: after a failure alone."""


@dataclass
class Flight:
    """A slot, and the chunk under way in it."""

    slot: Any
    course: Course | None = None
    awaited: Sequence[Pending] = ()
    """What must arrive before it goes on; when its course has ended, what must have left before the slot is free."""
    failure: BaseException | None = None
    is_free: bool = True
    _tasks: SimpleQueue[Callable[[], None] | None] | None = None

    def wait(self) -> None:
        """For what is awaited."""
        for pending in self.awaited:
            if self.course is None:
                pending.release()
            else:
                pending.wait()

    def wait_aside(self, then: Callable[[Flight], None]) -> None:
        """Wait in a thread, which calls ``then``."""
        if self._tasks is None:
            self._tasks = SimpleQueue()
            stop = partial(self._tasks.put, None)
            serve(self, "gradient-arrivals", partial(_work_off, self._tasks), stop, _STOP_SECONDS)
        self._tasks.put(partial(self._wait_then, then))

    def _wait_then(self, then: Callable[[Flight], None]) -> None:
        try:
            self.wait()
        except BaseException as failure:  # raised where the chunk would have gone on
            self.failure = failure
        then(self)


def _work_off(tasks: SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # whose it is may be gone before the next one


class Pipeline(Generic[Slot]):
    """Runs chunks over a fixed number of slots.

    All ranks of a team must run the same chunks in the same order.

    Args:
        slots: the buffers.
        waits_aside: whether waiting blocks, so that threads do it (CPUs).
        one_by_one: whether a chunk starts only once the one before has gone on (where ``waits_aside``). If a chunk's
            first piece is for ranks on the same cores, starting all that there is room for keeps them from what the
            link waits for.
    """

    def __init__(self, slots: Iterable[Slot], waits_aside: bool, one_by_one: bool = False) -> None:
        self._flights = deque(Flight(slot) for slot in slots)
        """The first is the next to start."""
        self._waits_aside = waits_aside
        self._one_by_one = one_by_one
        self._latest: Flight | None = None
        """The one that was started last, until it goes on."""
        self._failure: BaseException | None = None
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        """Flights that can go on. Who runs the pipeline may have other things put there, to wait for both."""

    @property
    def should_start(self) -> bool:
        """Whether one more chunk should start: there is room, and nothing goes before it.

        On CUDA chunks under way could always go on, and would come to wait on the stream one after another.
        """
        if not self._waits_aside:
            return self._flights[0].is_free
        waits_for_latest = self._one_by_one and self._latest is not None
        return self._flights[0].is_free and self.inbox.empty() and not waits_for_latest

    @property
    def is_idle(self) -> bool:
        """Whether no chunk is under way."""
        return all(flight.is_free for flight in self._flights)

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk; there must be room."""
        flight = self._flights[0]
        assert flight.is_free
        self._flights.rotate(-1)
        flight.is_free = False
        flight.course = chunk(flight.slot)
        self._latest = flight
        self._resume(flight)

    def advance(self, flight: Flight) -> None:
        """Take a chunk from the inbox a stage further."""
        if flight is self._latest:
            self._latest = None
        if not self._waits_aside:
            flight.wait()
        if flight.failure is not None:
            raise flight.failure
        if flight.course is None:
            flight.awaited = ()
            flight.is_free = True
        else:
            self._resume(flight)

    def run(self, chunks: Iterable[Chunk]) -> None:
        """All of them, to the end. After a failure this fails as it did: peers are not in step, nor slots free."""
        if self._failure is not None:
            raise self._failure
        try:
            for chunk in chunks:
                while not self.should_start:
                    self.advance(self.inbox.get())
                self.start(chunk)
            # To the end of what was sent: pieces may leave from the caller's own tensor. And torch's profiler can
            # crash if the caller stops it while threads of ours wait.
            while not self.is_idle:
                self.advance(self.inbox.get())
        except BaseException as failure:
            self._failure = failure
            raise

    def _resume(self, flight: Flight) -> None:
        assert flight.course is not None
        try:
            flight.awaited = (next(flight.course),)
        except StopIteration as end:
            flight.course = None
            flight.awaited = end.value
        if self._waits_aside:
            flight.wait_aside(self.inbox.put)
        else:
            self.inbox.put(flight)

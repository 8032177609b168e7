"""Many chunks under way at once, so that the link is busy while the arithmetic is done.

A chunk is a generator: it yields whatever it waits for, and is resumed when that has arrived. A pipeline starts
chunks in order as long as it has a slot (a set of buffers) for one more, and otherwise resumes the one that has come
least far: what can be sent is sent before anything else is waited for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from launcher.compression.links import Pending

__all__ = ["Chunk", "Pipeline"]

Slot = TypeVar("Slot")
Chunk = Callable[[Any], Generator[Pending, None, None]]
"""Called with its slot."""


@dataclass
class _Flight(Generic[Slot]):
    """A chunk that has begun and not ended."""

    course: Generator[Pending, None, None]
    slot: Slot
    stage: int = 0
    awaited: Pending | None = None


class Pipeline(Generic[Slot]):
    """Runs chunks over a fixed number of slots.

    All ranks of a team must run the same chunks in the same order.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = deque(slots)
        self._flights: deque[_Flight[Slot]] = deque()

    @property
    def has_room(self) -> bool:
        """Whether one more chunk can start."""
        return bool(self._slots)

    @property
    def is_idle(self) -> bool:
        """Whether no chunk is under way."""
        return not self._flights

    def start(self, chunk: Chunk) -> None:
        """Begin a chunk; there must be room."""
        slot = self._slots.popleft()
        flight = _Flight(chunk(slot), slot)
        self._flights.append(flight)
        self._resume(flight)

    def advance(self) -> None:
        """Wait for one chunk, the first of those that have come least far, and take it a stage further."""
        flight = min(self._flights, key=lambda each: each.stage)
        assert flight.awaited is not None
        flight.awaited.wait()
        self._resume(flight)

    def run(self, chunks: Iterable[Chunk]) -> None:
        """All of them, to the end."""
        for chunk in chunks:
            while not self.has_room:
                self.advance()
            self.start(chunk)
        while not self.is_idle:
            self.advance()

    def _resume(self, flight: _Flight[Slot]) -> None:
        flight.awaited = next(flight.course, None)
        flight.stage += 1
        if flight.awaited is None:
            self._flights.remove(flight)
            self._slots.append(flight.slot)

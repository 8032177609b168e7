"""Many chunks under way at once, so that the link is busy while the arithmetic is done.

A chunk is a generator: it yields whatever it waits for, and is resumed when that has arrived. A pipeline starts
chunks in order as long as it has a slot (a set of buffers) for one more, and otherwise resumes the oldest that has
still something to send, or else the oldest.

Ranks start chunks at different times, and whoever waits starts nothing. So nobody may wait for a chunk that another
rank has perhaps not begun while an older one, for which that rank perhaps waits, has something left to send.
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
    awaited: Pending | None = None

    @property
    def has_sent_all(self) -> bool:
        return self.awaited is not None and self.awaited.is_last


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
        """Wait for one chunk and take it a stage further."""
        flight = min(self._flights, key=lambda each: each.has_sent_all)  # the first of the least
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
        if flight.awaited is None:
            self._flights.remove(flight)
            self._slots.append(flight.slot)

"""The errors of one flat tensor on one rank, also where it does not hold the same parameters in every step.

What is saved, and what others see, is always of all parameters (``Memories.whole``). A step in which some have no
gradient works on a memory of its own, which takes its errors from the whole one, and gives them back when another
layout comes, or when the state is asked for: parameters that are away keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from launcher.compression.feedback import Feedback
from launcher.compression.layout import Layout, Slice

__all__ = ["Memories", "Memory"]


@dataclass(frozen=True)
class Memory:
    """The errors of one flat tensor. No element has one in both feedbacks: a rank sends it, or owns it."""

    layout: Layout
    scattered: Feedback
    """Of what this rank sends to the owners."""
    sent: tuple[Slice, ...]
    """Where in ``scattered`` the elements of which parameter are."""
    gathered: Feedback | None = None
    """Of the mean that this rank owns."""
    owned: tuple[Slice, ...] = ()

    @property
    def feedbacks(self) -> list[Feedback]:
        """One or two."""
        return [self.scattered] if self.gathered is None else [self.scattered, self.gathered]

    def stay(self, names: frozenset[str]) -> None:
        """Whatever the step has written for these parameters: the errors that were kept stay."""
        for name, places in self.places().items():
            for place in places if name in names else ():
                place.feedback.stay(place.offset, place.end - place.start)

    def places(self) -> dict[str, list[_Place]]:
        """Where the elements of each parameter are, in their order."""
        found: dict[str, list[_Place]] = {}
        for feedback, slices in zip(self.feedbacks, (self.sent, self.owned), strict=False):
            for part in slices:
                end = part.start + part.length
                found.setdefault(part.name, []).append(_Place(part.start, end, feedback, part.offset))
        return {name: sorted(places, key=attrgetter("start")) for name, places in found.items()}


class _Place(NamedTuple):
    start: int
    end: int
    feedback: Feedback
    offset: int


class _Move(NamedTuple):
    """The same elements in two memories."""

    source: Feedback
    first: int
    target: Feedback
    target_first: int
    length: int

    def run(self) -> None:
        kept = self.source.kept[self.first : self.first + self.length]
        self.target.kept[self.target_first : self.target_first + self.length] = kept


def _moves(source: Memory, target: Memory) -> Iterator[_Move]:
    there = target.places()
    for name, places in source.places().items():
        yield from _overlaps(places, there.get(name, ()))


def _overlaps(sources: Sequence[_Place], targets: Sequence[_Place]) -> Iterator[_Move]:
    here, there = 0, 0
    while here < len(sources) and there < len(targets):
        source, target = sources[here], targets[there]
        first, last = max(source.start, target.start), min(source.end, target.end)
        if first < last:
            offset, target_offset = source.offset + first - source.start, target.offset + first - target.start
            yield _Move(source.feedback, offset, target.feedback, target_offset, last - first)
        if source.end <= target.end:
            here += 1
        else:
            there += 1


class Memories:
    """Those of one flat tensor.

    Args:
        whole: of all parameters that the tensor may hold.
        build: makes a memory without errors for another layout.
    """

    def __init__(self, whole: Memory, build: Callable[[Layout], Memory]) -> None:
        self.whole = whole
        self._build = build
        self.active = whole
        """What the last step has worked on."""
        self._partial: dict[Layout, tuple[Memory, list[_Move], list[_Move]]] = {}

    def covers(self, layout: Layout) -> bool:
        """Whether all parameters of ``layout`` have a place here."""
        return layout == self.whole.layout or layout.names < self.whole.layout.names

    def take(self, layout: Layout) -> Memory:
        """What a step with this layout works on."""
        if self.active.layout == layout:
            return self.active
        self.gather()
        if layout != self.whole.layout:
            if layout not in self._partial:
                memory = self._build(layout)
                self._partial[layout] = memory, list(_moves(self.whole, memory)), list(_moves(memory, self.whole))
            self.active, taken, _ = self._partial[layout]
            for move in taken:
                move.run()
        return self.active

    def gather(self) -> None:
        """Bring all errors to where they are saved; between steps."""
        if self.active is not self.whole:
            for move in self._partial[self.active.layout][2]:
                move.run()
            self.active = self.whole

    def inherit(self, former: Memories) -> None:
        """Take over the errors of another layout's parameters that are here too."""
        former.gather()
        for move in _moves(former.whole, self.whole):
            move.run()

    @property
    def passing(self) -> list[Feedback]:
        """Those that are not the whole memory's."""
        return [feedback for memory, _, _ in self._partial.values() for feedback in memory.feedbacks]

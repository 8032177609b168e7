"""Chunks under way: never more than there are slots, each to its end, whatever arrives first."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.compression.links import Pending
from launcher.compression.pipeline import Chunk, Course, Pipeline

_SECONDS = 10.0
aside = pytest.mark.parametrize("waits_aside", [True, False])


class Diary:
    """What chunks do, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, int, int]] = []
        self.in_use: set[str] = set()
        self.most = 0

    def chunk(self, number: int, stages: int, wait: Callable[[int, int], None] = lambda number, stage: None) -> Chunk:
        def course(slot: str) -> Course:
            assert slot not in self.in_use
            self.in_use.add(slot)
            self.most = max(self.most, len(self.in_use))
            for stage in range(stages):
                self.entries.append(("sent", number, stage))
                yield _Waiting(partial(wait, number, stage))
                self.entries.append(("arrived", number, stage))
            self.entries.append(("done", number, 0))
            return [_Leaving(lambda: self.in_use.remove(slot))]

        return course


class _Waiting(Pending):
    def __init__(self, wait: Callable[[], None]) -> None:
        super().__init__((), ())
        self._wait = wait

    def wait(self) -> None:
        self._wait()


class _Leaving(Pending):
    def __init__(self, release: Callable[[], None]) -> None:
        super().__init__((), ())
        self._release = release

    def release(self) -> None:
        self._release()


@given(st.booleans(), st.booleans(), st.integers(1, 4), st.lists(st.integers(0, 4), max_size=9))
def test_every_chunk_runs_to_its_end_in_a_slot_of_its_own(
    waits_aside: bool, one_by_one: bool, num_slots: int, stages: list[int]
) -> None:
    diary = Diary()
    pipeline = Pipeline([str(slot) for slot in range(num_slots)], waits_aside, one_by_one)
    pipeline.run(diary.chunk(number, count) for number, count in enumerate(stages))
    assert pipeline.is_idle
    assert not diary.in_use, "what was sent has left before the slot is free"
    assert diary.most <= num_slots
    for kind in ("sent", "arrived"):
        done = [(number, stage) for what, number, stage in diary.entries if what == kind]
        assert sorted(done) == [(number, stage) for number, count in enumerate(stages) for stage in range(count)]
    begun = [number for what, number, stage in diary.entries if (what, stage) == ("sent", 0)]
    assert begun == [number for number, count in enumerate(stages) if count], "they start in order"
    for number in begun:
        if number >= num_slots:
            older = diary.entries.index(("done", number - num_slots, 0))
            assert older < diary.entries.index(("sent", number, 0)), "slots take turns"


@aside
def test_all_slots_are_filled_while_nothing_can_go_on(waits_aside: bool) -> None:
    diary = Diary()
    all_have_begun = threading.Event()

    def wait(number: int, stage: int) -> None:
        if stage == 0:
            assert all_have_begun.wait(_SECONDS)

    def last(slot: str) -> Course:
        all_have_begun.set()
        return (yield from diary.chunk(2, 2)(slot))

    Pipeline(["0", "1", "2"], waits_aside).run([diary.chunk(0, 2, wait), diary.chunk(1, 2, wait), last])
    assert [what for what, _, _ in diary.entries[:3]] == ["sent"] * 3


def test_what_can_go_on_goes_before_what_could_start() -> None:
    """The link gets a chunk's next piece sooner; on CPUs, where starting is work."""
    diary = Diary()
    pipeline = Pipeline(["0", "1", "2"], waits_aside=True)
    pipeline.start(diary.chunk(0, 2))
    arrived = pipeline.inbox.get(timeout=_SECONDS)
    assert pipeline.should_start, "nothing can go on, and there is room"
    pipeline.inbox.put(arrived)
    assert not pipeline.should_start
    pipeline.run(diary.chunk(number, 2) for number in (1, 2))
    assert diary.entries.index(("sent", 0, 1)) < diary.entries.index(("sent", 1, 0))


def test_one_by_one_a_chunk_starts_once_the_one_before_has_gone_on() -> None:
    """But does not wait for it to end."""
    diary, has_arrived, may_end = Diary(), threading.Event(), threading.Event()
    pipeline = Pipeline(["0", "1"], waits_aside=True, one_by_one=True)

    def wait(number: int, stage: int) -> None:
        assert (has_arrived if stage == 0 else may_end).wait(_SECONDS)

    pipeline.start(diary.chunk(0, 2, wait))
    assert not pipeline.should_start
    has_arrived.set()
    pipeline.advance(pipeline.inbox.get(timeout=_SECONDS))
    assert pipeline.should_start
    may_end.set()
    pipeline.run([diary.chunk(1, 2, wait)])
    assert pipeline.is_idle


def test_a_slot_that_is_free_before_its_turn_stays_so() -> None:
    """Neighbours rest on it: who has started a chunk has ended all that are as many slots older."""
    diary, may_end = Diary(), threading.Event()
    pipeline = Pipeline(["0", "1"], waits_aside=True)
    pipeline.start(diary.chunk(0, 1, lambda number, stage: _await(may_end)))
    pipeline.start(diary.chunk(1, 1))
    for _ in range(2):  # what chunk 1 waits for, and that it has left
        pipeline.advance(pipeline.inbox.get(timeout=_SECONDS))
    assert diary.in_use == {"0"}
    assert not pipeline.should_start
    may_end.set()
    pipeline.run([diary.chunk(2, 1)])
    assert [number for what, number, _ in diary.entries if what == "done"] == [1, 0, 2]


def _await(event: threading.Event) -> None:
    assert event.wait(_SECONDS)


def test_a_chunk_whose_pieces_have_come_does_not_wait_for_an_older_one() -> None:
    """Where ranks begin a chunk at different times, ranks would wait for each other for ever."""
    diary = Diary()
    younger_is_done = threading.Event()

    def wait(number: int, stage: int) -> None:
        if (number, stage) == (0, 0):
            assert younger_is_done.wait(_SECONDS)

    def younger(slot: str) -> Course:
        sent = yield from diary.chunk(1, 3)(slot)
        younger_is_done.set()
        return sent

    Pipeline(["a", "b"], waits_aside=True).run([diary.chunk(0, 2, wait), younger])
    assert [number for what, number, _ in diary.entries if what == "done"] == [1, 0]


def test_without_threads_chunks_go_on_in_the_order_in_which_they_have_sent() -> None:
    """So that the order is the same on every rank."""
    diary = Diary()
    Pipeline(["a", "b"], waits_aside=False).run(diary.chunk(number, 3) for number in range(2))
    arrived = [(number, stage) for what, number, stage in diary.entries if what == "arrived"]
    assert arrived == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]


@aside
def test_a_failure_in_a_chunk_reaches_the_caller(waits_aside: bool) -> None:
    def broken(slot: str) -> Course:
        yield Pending((), ())
        raise RuntimeError("lost the peer")

    with pytest.raises(RuntimeError, match="lost the peer"):
        Pipeline(["a"], waits_aside).run([broken])


@aside
def test_after_a_failure_all_fail_and_none_waits_for_ever(waits_aside: bool) -> None:
    """Its peers are not in step any more, and its slot is not free."""

    def broken(slot: str) -> Course:
        yield Pending((), ())
        raise RuntimeError("lost the peer")

    pipeline, diary = Pipeline(["a", "b"], waits_aside), Diary()
    for chunks in ([diary.chunk(0, 2), broken], [diary.chunk(1, 1)], [diary.chunk(2, 1)] * 5, []):
        with pytest.raises(RuntimeError, match="lost the peer"):
            pipeline.run(chunks)
    assert not [number for what, number, _ in diary.entries if number > 0]


def test_threads_end_with_their_pipeline() -> None:
    gc.collect()  # other tests'
    before = threading.active_count()
    pipeline = Pipeline(["a", "b", "c"], waits_aside=True)
    pipeline.run(Diary().chunk(number, 2) for number in range(9))
    assert threading.active_count() > before
    del pipeline
    gc.collect()
    assert threading.active_count() == before


@aside
def test_a_failure_of_what_is_waited_for_reaches_the_caller(waits_aside: bool) -> None:
    def wait(number: int, stage: int) -> None:
        raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError, match="closed by peer"):
        Pipeline(["a"], waits_aside).run([Diary().chunk(0, 1, wait)])

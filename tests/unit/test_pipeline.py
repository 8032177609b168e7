"""Chunks under way: never more than there are slots, each to its end, in an order in which no two ranks block."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.compression.links import Pending
from launcher.compression.pipeline import Chunk, Pipeline


class Diary:
    """What chunks do, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, int, int]] = []
        self.in_use: set[str] = set()
        self.most = 0

    def chunk(self, number: int, stages: int) -> Chunk:
        def course(slot: str) -> Generator[Pending, None, None]:
            assert slot not in self.in_use
            self.in_use.add(slot)
            self.most = max(self.most, len(self.in_use))
            for stage in range(stages):
                self.entries.append(("sent", number, stage))
                yield _Noted(self, number, stage, is_last=stage == stages - 1)
            self.in_use.remove(slot)

        return course


class _Noted(Pending):
    def __init__(self, diary: Diary, number: int, stage: int, is_last: bool) -> None:
        super().__init__((), ())
        self.is_last = is_last
        self._diary, self._number, self._stage = diary, number, stage

    def wait(self) -> None:
        self._diary.entries.append(("waited", self._number, self._stage))


@given(st.integers(1, 4), st.lists(st.integers(0, 4), max_size=9))
def test_every_chunk_runs_to_its_end_in_a_slot_of_its_own(num_slots: int, stages: list[int]) -> None:
    diary = Diary()
    pipeline = Pipeline(str(slot) for slot in range(num_slots))
    pipeline.run(diary.chunk(number, count) for number, count in enumerate(stages))
    assert pipeline.is_idle
    assert diary.most <= num_slots
    for kind in ("sent", "waited"):
        done = [(number, stage) for what, number, stage in diary.entries if what == kind]
        assert sorted(done) == [(number, stage) for number, count in enumerate(stages) for stage in range(count)]
    begun = [number for what, number, stage in diary.entries if (what, stage) == ("sent", 0)]
    assert begun == [number for number, count in enumerate(stages) if count], "they start in order"


def test_all_slots_are_filled_before_anything_is_waited_for() -> None:
    diary = Diary()
    Pipeline(range(3)).run(diary.chunk(number, 2) for number in range(3))
    assert [what for what, _, _ in diary.entries[:3]] == ["sent"] * 3


@pytest.mark.parametrize(
    ("stages", "order"),
    [
        (2, [(0, 0), (1, 0), (0, 1), (1, 1)]),
        (3, [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2)]),
    ],
)
def test_the_oldest_that_has_something_to_send_goes_on_first(stages: int, order: list[tuple[int, int]]) -> None:
    """Where ranks begin a chunk at different times, any other order has ranks wait for each other for ever."""
    diary = Diary()
    Pipeline(range(2)).run(diary.chunk(number, stages) for number in range(2))
    assert [(number, stage) for what, number, stage in diary.entries if what == "waited"] == order


def test_a_failure_in_a_chunk_reaches_the_caller() -> None:
    def broken(slot: int) -> Generator[Pending, None, None]:
        yield Pending((), ())
        raise RuntimeError("lost the peer")

    with pytest.raises(RuntimeError, match="lost the peer"):
        Pipeline(range(1)).run([broken])

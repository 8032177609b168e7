"""Where elements are in flat tensors, what is kept of them, and who takes it up again."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from launcher.compression.feedback import Feedback
from launcher.compression.layout import Layout, Slice, parse_key, slice_key
from launcher.compression.links import Grid
from launcher.compression.terms import StepTerms
from launcher.compression.wire import Residue, Wire

SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(torch.Size), min_size=1, max_size=4)
CPU = torch.device("cpu")


def named(shapes: list[torch.Size]) -> list[tuple[str, torch.Size]]:
    return [(f"p{index}", shape) for index, shape in enumerate(shapes)]


def test_a_bucket_holds_whole_parameters_one_after_the_other() -> None:
    layout = Layout.of_bucket([("a.weight", 6), ("empty", 0), ("b", 1)])
    assert layout.numel == 7
    assert layout.slices == (Slice(0, "a.weight", 0, 6), Slice(6, "empty", 0, 0), Slice(6, "b", 0, 1))


@given(SHAPES, st.integers(1, 5))
def test_shards_lie_as_fsdp_copies_them_in(shapes: list[torch.Size], num_shards: int) -> None:
    """FSDP2's copy-in: each gradient's rows in ``torch.chunk``'s pieces, padded to the first one's, then by shard."""
    flats, parts = {}, []
    for index, (name, shape) in enumerate(named(shapes)):
        flats[name] = torch.arange(1, shape.numel() + 1) + 1000 * index
        rows = -(-shape[0] // num_shards)
        padded = torch.zeros(rows * num_shards, shape[1:].numel(), dtype=torch.int64)
        padded[: shape[0]] = flats[name].view(shape[0], -1)
        parts.append(padded.view(num_shards, -1))
    expected = torch.cat(parts, dim=1).flatten()
    layout = Layout.of_shards(named(shapes), num_shards)
    assert layout.numel == expected.numel()
    filled = torch.zeros_like(expected)
    for part in layout.slices:
        filled[part.offset : part.offset + part.length] = flats[part.name][part.start : part.start + part.length]
    assert torch.equal(filled, expected)


@given(SHAPES, st.integers(1, 5))
def test_the_parts_of_a_layout_cover_each_element_once(shapes: list[torch.Size], num_shards: int) -> None:
    layout = Layout.of_shards(named(shapes), num_shards)
    covered = {name: torch.zeros(shape.numel()) for name, shape in named(shapes)}
    for index in range(num_shards):
        part = layout.part(index, num_shards)
        assert part.numel == layout.numel // num_shards
        for each in part.slices:
            assert 0 <= each.offset <= each.offset + each.length <= part.numel
            covered[each.name][each.start : each.start + each.length] += 1
    assert all((count == 1).all() for count in covered.values())


def test_a_parameter_with_fewer_rows_than_shards_leaves_the_last_ones_empty() -> None:
    layout = Layout.of_shards([("odd", torch.Size([2, 3]))], 4)
    assert [layout.part(index, 4).slices for index in (1, 2, 3)] == [(Slice(0, "odd", 3, 3),), (), ()]


def test_keys_are_read_back() -> None:
    part = Slice(9, "blocks.0.up.weight", 12, 4)
    assert parse_key(slice_key("shard.scattered", part)) == ("shard.scattered", "blocks.0.up.weight", 12)
    assert parse_key("weight/shard.scattered")[2] == -1
    assert parse_key("replica.steps")[2] == -1


APPLIED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def test_an_applied_step_keeps_its_errors_and_a_skipped_one_leaves_the_last() -> None:
    feedback = Feedback(4, CPU)
    terms = StepTerms(CPU)
    terms.looks = True
    feedback.keep(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0, terms)
    feedback.settle(APPLIED)
    assert feedback.kept.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert not terms.take_non_finite()
    feedback.keep(torch.tensor([float("nan"), 0.0]), 0, terms)
    feedback.keep(torch.zeros(2), 2, terms)
    assert terms.take_non_finite()
    feedback.settle(SKIPPED)
    assert feedback.kept.tolist() == [1.0, 2.0, 3.0, 4.0]
    feedback.settle(APPLIED)
    assert feedback.kept.tolist() == [1.0, 2.0, 3.0, 4.0], "a step in which nothing was written changes nothing"


def test_errors_are_free_of_the_loss_scale() -> None:
    feedback = Feedback(3, CPU)
    terms = StepTerms(CPU)
    terms.begin(torch.tensor(8.0), measures=False)
    feedback.keep(torch.tensor([8.0, 16.0]), 1, terms)
    feedback.settle(APPLIED)
    assert feedback.kept.tolist() == [0.0, 1.0, 2.0]
    terms.begin(torch.tensor(16.0), measures=False)
    assert feedback.carried(1, torch.empty(2), terms).tolist() == [16.0, 32.0]
    terms.begin(torch.tensor(1.0), measures=False)
    assert feedback.carried(1, torch.empty(2), terms).tolist() == [1.0, 2.0]


def test_errors_that_are_finite_only_with_the_loss_scale_are_seen() -> None:
    feedback, terms = Feedback(1, CPU), StepTerms(CPU)
    terms.begin(torch.tensor(1e-30), measures=False)
    terms.looks = True
    feedback.keep(torch.tensor([1e10]), 0, terms, witness=torch.ones(1))
    assert terms.take_non_finite()


def test_errors_written_where_they_are_kept_need_no_copy_and_no_second_look() -> None:
    feedback, terms = Feedback(3, CPU), StepTerms(CPU)
    terms.looks = True
    for witness, is_finite in ((torch.ones(1), True), (torch.tensor([float("inf")]), False)):
        room = feedback.room(1, 2)
        room.copy_(torch.tensor([3.0, 4.0]))
        feedback.keep(room, 1, terms, witness)
        feedback.settle(APPLIED)
        assert feedback.kept.tolist() == [0.0, 3.0, 4.0]
        assert bool(terms.take_non_finite()) is not is_finite


@pytest.mark.parametrize(
    ("hosts", "rank", "rows", "host", "place"),
    [
        (["a", "a", "b", "b"], 2, ((0, 1), (2, 3)), 1, 0),
        (["a", "b", "a", "b"], 2, ((0, 2), (1, 3)), 0, 1),
        (["a", "b"], 1, ((0,), (1,)), 1, 0),
        (["a", "a", "a"], 1, ((0,), (1,), (2,)), 1, 0),
        (["a", "a", "b"], 1, ((0,), (1,), (2,)), 1, 0),
        (["a"], 0, ((0,),), 0, 0),
    ],
    ids=["two each", "interleaved", "one each", "one host", "unequal", "alone"],
)
def test_ranks_are_arranged_by_host(
    hosts: list[str], rank: int, rows: tuple[tuple[int, ...], ...], host: int, place: int
) -> None:
    grid = Grid.of_hosts(hosts, rank)
    assert grid == Grid(rows, host, place)
    assert grid.num_hosts * grid.ranks_per_host == len(hosts)


def wire_with(*kept: tuple[str, Layout, float, float, list[float]]) -> Wire:
    """Errors of (kind, layout, weight, share, values)."""
    wire = Wire(CPU)
    for kind, layout, weight, share, values in kept:
        feedback = Feedback(layout.numel, CPU)
        feedback.kept.copy_(torch.tensor(values))
        wire.residues.append(Residue(kind, feedback, layout.slices, weight, share))
    return wire


def kept(wire: Wire) -> list[list[float]]:
    return [residue.feedback.kept.tolist() for residue in wire.residues]


WHOLE = Layout.of_bucket([("a", 2), ("b", 2)])
FIRST, SECOND = Layout((Slice(0, "a", 0, 2),), 2), Layout((Slice(0, "b", 0, 2),), 2)


def test_a_rank_takes_up_its_own_to_the_last_bit() -> None:
    values = [0.1, 1e-30, -3.0, 4.0]
    saved = wire_with(("replica.gathered", WHOLE, 1.0, 1.0, values)).state_dict()
    wire = wire_with(("replica.gathered", WHOLE, 1.0, 1.0, [9.0] * 4))
    wire.load_state_dict(lambda rank: saved, 1)
    assert kept(wire) == [torch.tensor(values).tolist()]


def test_two_ranks_errors_are_added_up_for_one() -> None:
    saved = [
        wire_with(("replica.scattered", WHOLE, 1.0, 0.0, [1.0, 2.0, 3.0, 4.0])).state_dict(),
        wire_with(("replica.scattered", WHOLE, 1.0, 0.0, [10.0, 20.0, 30.0, 40.0])).state_dict(),
    ]
    wire = wire_with(
        ("replica.scattered", WHOLE, 1.0, 0.0, [9.0] * 4), ("replica.gathered", WHOLE, 1.0, 1.0, [9.0] * 4)
    )
    wire.load_state_dict(saved.__getitem__, 2)
    assert kept(wire) == [[0.0] * 4, [11.0, 22.0, 33.0, 44.0]]


def test_ones_errors_are_split_among_those_that_send_them() -> None:
    saved = wire_with(("replica.gathered", WHOLE, 1.0, 1.0, [1.0, 2.0, 3.0, 4.0])).state_dict()
    first, second = (wire_with(("shard.scattered", layout, 1.0, 1.0, [9.0, 9.0])) for layout in (FIRST, SECOND))
    for wire in (first, second):
        wire.load_state_dict(lambda rank: saved, 1)
    assert kept(first) + kept(second) == [[1.0, 2.0], [3.0, 4.0]]


def test_weights_tell_what_an_error_counts_in_the_mean() -> None:
    saved = wire_with(("shard.scattered", WHOLE, 0.5, 0.0, [2.0] * 4)).state_dict()
    wire = wire_with(("replica.low_rank", WHOLE, 0.25, 0.25, [9.0] * 4))
    wire.load_state_dict(lambda rank: saved, 1)
    assert kept(wire) == [[1.0] * 4], "0.5 · 2 in the mean, in each of four ranks' own terms"


def test_nothing_saved_is_no_errors() -> None:
    wire = wire_with(("replica.gathered", WHOLE, 1.0, 1.0, [9.0] * 4))
    empty: Mapping[str, Tensor] = {}
    wire.load_state_dict(lambda rank: empty, 3)
    assert kept(wire) == [[0.0] * 4]

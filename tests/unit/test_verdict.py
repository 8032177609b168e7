"""What the preflight check makes of measurements: every pair once, and the right node named."""

from __future__ import annotations

from itertools import combinations

import pytest

from slurm.verdict import NodeReport, problems, rounds, table


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 7, 8])
def test_everybody_meets_everybody_once_and_nobody_two_at_a_time(num_nodes: int) -> None:
    schedule = rounds(num_nodes, partners=num_nodes)
    assert sorted(pair for pairs in schedule for pair in pairs) == sorted(combinations(range(num_nodes), 2))
    for pairs in schedule:
        nodes = [node for pair in pairs for node in pair]
        assert len(nodes) == len(set(nodes))


def test_partners_bound_the_rounds() -> None:
    assert len(rounds(64, partners=3)) == 3


def measured(speeds: dict[tuple[int, int], float], num_nodes: int) -> list[NodeReport]:
    """Reports with 10 GB/s wherever ``speeds`` has nothing else; 0 is a failure."""
    reports = [NodeReport(f"n{number}", "10.0.0.1") for number in range(num_nodes)]
    for one, other in combinations(range(num_nodes), 2):
        speed = speeds.get((one, other), 10.0)
        for node, partner in ((one, other), (other, one)):
            if speed:
                reports[node].speeds[f"n{partner}"] = speed
            else:
                reports[node].failures[f"n{partner}"] = "timed out"
    return reports


def test_equal_nodes_have_no_problems() -> None:
    assert problems(measured({}, 4), [], None) == []


def test_a_slow_node_is_named_and_its_partners_are_not() -> None:
    (problem,) = problems(measured({(0, 2): 1.0, (1, 2): 1.0, (2, 3): 1.0}, 4), [], None)
    assert problem.startswith("slow: n2 (1 GB/s")


def test_a_slow_way_between_two_good_nodes_is_named_as_such() -> None:
    (problem,) = problems(measured({(1, 3): 1.0}, 4), [], None)
    assert problem.startswith("slow between n1 and n3 (1 GB/s")


def test_a_broken_way_and_an_unreachable_node_are_told_apart() -> None:
    assert problems(measured({(1, 3): 0}, 4), [], None) == ["no way between n1 and n3 (timed out)"]
    assert problems(measured({(0, 1): 0, (1, 2): 0, (1, 3): 0}, 4), [], None) == ["unreachable: n1 (timed out)"]


def test_missing_nodes_are_named() -> None:
    assert problems(measured({}, 2), ["n2"], None) == ["missing: n2"]


def test_a_floor_finds_what_a_comparison_cannot() -> None:
    (problem,) = problems(measured({}, 2), [], at_least=20.0)
    assert problem == "slow between n0 and n1 (10 GB/s, expected 20)"


def test_the_slowest_node_comes_first_in_the_table() -> None:
    lines = table(measured({(0, 2): 1.0, (1, 2): 1.0}, 3)).splitlines()
    assert lines[1].split()[0] == "n2"

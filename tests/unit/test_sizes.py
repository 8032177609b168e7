"""How many machines a run may have, and who shares its global batch on so many."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.node_rules import node_problems, node_warnings
from launcher.config.prepare import prepare
from launcher.config.schema import RunConfig
from launcher.config.sizes import NodeRange, accumulation_steps, node_range, usable_nodes, world_size
from launcher.errors import ConfigurationError
from tests.unit.configs import good_config


def elastic(nodes: str = "1-2", **changes: Any) -> RunConfig:
    """Micro-batches of 8 on 2 workers of each machine; global batch 64."""
    return good_config(**{"cluster__kind": "slurm", "cluster__nodes": nodes, **changes})


@pytest.mark.parametrize(
    ("value", "least", "most"), [(3, 3, 3), ("3", 3, 3), ("2-4", 2, 4), ("2-2", 2, 2), ("1-100", 1, 100)]
)
def test_a_number_or_a_range_is_understood(value: int | str, least: int, most: int) -> None:
    assert NodeRange.parse(value) == NodeRange(least, most)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("4-2", ["cluster.nodes=4-2", "the smaller number comes first, 2-4"]),
        ("0-2", ["cluster.nodes=0-2", "at least 1"]),
        (0, ["cluster.nodes=0", "at least 1"]),
        (-1, ["cluster.nodes=-1", "at least 1"]),
        ("a-b", ["cluster.nodes=a-b", "such as 2, or a range, such as 2-4"]),
        ("2-", ["cluster.nodes=2-", "such as 2-4"]),
        ("2..4", ["cluster.nodes=2..4", "such as 2-4"]),
        ("2 - 4", ["cluster.nodes=2 - 4", "such as 2-4"]),
        ("1-2-3", ["cluster.nodes=1-2-3", "such as 2-4"]),
    ],
)
def test_what_is_neither_is_refused_in_one_message(value: int | str, words: list[str]) -> None:
    config = elastic()
    config.cluster.nodes = value
    (problem,) = node_problems(config)
    for word in words:
        assert word in problem


def test_a_range_on_this_machine_is_refused() -> None:
    (problem,) = node_problems(elastic(cluster__kind="local"))
    assert problem == (
        "cluster.nodes=1-2, but cluster=local is this one machine: use cluster.nodes=1, or cluster=slurm."
    )


@pytest.mark.parametrize(("written", "meant"), [("2-2", 2), ("2", 2), (2, 2), ("1-2", "1-2")])
def test_a_configuration_says_it_in_one_way(written: int | str, meant: int | str) -> None:
    config = elastic(cluster__nodes=written)
    prepare(config)
    assert config.cluster.nodes == meant


def test_every_number_of_machines_that_fits_is_used() -> None:
    config = elastic("1-4")
    assert [usable_nodes(config, count) for count in (1, 2, 3, 4)] == [1, 2, 2, 4]
    (warning,) = node_warnings(config)
    assert "cluster.nodes=1-4: of 3 machines 2 will train, and the others stay idle" in warning
    assert "micro-batches of 8 on 6 worker(s)" in warning
    assert warning.endswith("train.global_batch_size=192 divides over any of them.")
    assert list(node_warnings(elastic("1-4", train__global_batch_size=192))) == []


def test_no_batch_is_suggested_that_nobody_would_want() -> None:
    (warning,) = node_warnings(elastic("1-16", train__global_batch_size=256))
    assert "divides over any" not in warning


def test_the_fewest_machines_must_fit_and_those_that_do_are_named() -> None:
    (problem,) = node_problems(elastic("3-4"))
    assert "cluster.nodes=3-4: 3 machine(s), the fewest, cannot share the run" in problem
    assert "train.global_batch_size=64" in problem
    assert "Of this range fit: 4. train.global_batch_size=192 divides over any of them." in problem


def test_the_shards_of_hsdp_must_fit_too() -> None:
    changes = {"parallel__strategy": "hsdp", "parallel__shard_size": 4}
    (problem,) = node_problems(elastic("1-2", **changes))
    assert "parallel.shard_size=4 does not divide the 2 worker(s). Of this range fit: 2." in problem
    config = elastic("2-4", train__global_batch_size=192, **changes)
    assert list(node_problems(config)) == []
    assert [usable_nodes(config, count) for count in (2, 3, 4)] == [2, 2, 4]
    (warning,) = node_warnings(config)
    assert "parallel.shard_size=4 does not divide the 6 worker(s)" in warning
    assert list(node_problems(elastic("1-2", parallel__strategy="hsdp"))) == [], "null: a machine is a replica"


def test_a_batch_that_would_change_with_the_machines_is_refused() -> None:
    (problem,) = node_problems(elastic(train__global_batch_size=None, train__accumulation_steps=3))
    assert "train.accumulation_steps=3 with cluster.nodes=1-2" in problem
    assert "train.global_batch_size=96 is that of 2 machines" in problem


@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 4), st.integers(1, 8), st.integers(1, 400))
def test_what_is_not_refused_keeps_its_global_batch_on_whatever_comes(
    least: int, more: int, processes: int, micro_batch_size: int, batch: int
) -> None:
    config = elastic(f"{least}-{least + more}")
    config.cluster.processes_per_node = processes
    config.train.global_batch_size, config.train.micro_batch_size = batch, micro_batch_size
    if list(node_problems(config)):
        assert batch % (least * processes * micro_batch_size) != 0
        return
    nodes = node_range(config)
    for count in nodes.counts:
        usable = usable_nodes(config, count)
        assert least <= usable <= count
        workers = world_size(config, usable)
        assert accumulation_steps(config, workers) * workers * micro_batch_size == batch
    warned = any(usable_nodes(config, count) < count for count in nodes.counts)
    assert warned == bool(list(node_warnings(config)))
    assert batch % (math.lcm(*nodes.counts) * processes * micro_batch_size) != 0 or not warned


def test_neither_number_nor_text_is_one_message() -> None:
    from launcher.config.compose import compose

    with pytest.raises(ConfigurationError, match=r"cluster.nodes: Value '2.5' .* is neither a whole number nor a text"):
        compose(["+experiment=gpt_tiny", "cluster.nodes=2.5"], lambda config: [], lambda config, warnings: None)

"""A value in SLURM's form, or with a unit, is answered with the form that the field takes; nothing is submitted."""

from __future__ import annotations

import pytest

from tests.unit.composing import refused


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("gpus_per_node=a100:2", "a100:2 is not a whole number. How many: cluster.gpus_per_node=2."),
        ("gpus_per_node=gpu:h100:8", "cluster.gpus_per_node=8. Their kind goes to sbatch"),
        ("gpus_per_node=a100:2", "+cluster.sbatch.constraint=a100"),
        ("memory_gib=64G", "64G is not a number. GiB, as a number alone: cluster.memory_gib=64."),
        ("memory_gib=512000M", "cluster.memory_gib=500."),
        ("memory_gib=1TiB", "cluster.memory_gib=1024."),
        (
            "time_limit_min=01:30:00",
            "01:30:00 is not a whole number. Minutes, as a whole number: cluster.time_limit_min=90.",
        ),
        ("time_limit_min=1-12", "cluster.time_limit_min=2160."),
        ("time_limit_min=2-01:30", "cluster.time_limit_min=2970."),
        ("time_limit_min=90m", "cluster.time_limit_min=90."),
        ("time_limit_min=2h", "cluster.time_limit_min=120."),
        ("time_limit_min=infinite", "infinite is not a whole number. Minutes, as a whole number"),
        ("signal_lead_seconds=5min", "cluster.signal_lead_seconds=300."),
        ("snapshot_limit_mib=1G", "cluster.snapshot_limit_mib=1024."),
        ("max_parallel_jobs=all", "all is not a whole number. A whole number, such as cluster.max_parallel_jobs=4"),
        ("requeue=maybe", "cluster.requeue=maybe is neither true nor false."),
        ("partition=[a,b]", r"cluster.partition=\'a,b\'"),
        ("sbatch=--exclusive", "+cluster.sbatch.NAME=VALUE"),
        ("time=01:00:00", "What sbatch calls --time is cluster.time_limit_min here."),
        ("mem=64G", "What sbatch calls --mem is cluster.memory_gib here."),
        ("exclude=node1", "An option of sbatch is passed on as it is: +cluster.sbatch.exclude=…"),
    ],
)
def test_the_other_form_is_answered_with_the_own_one(given: str, answer: str) -> None:
    said = refused(["+experiment=mlp_digits", "cluster=slurm", "device=cpu", f"cluster.{given}"])
    assert answer in said
    assert "\n" not in said
    assert "could not be converted" not in said

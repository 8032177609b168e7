"""Every rule across fields refuses what it should, in words that name the value and the way out."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.rules import check
from launcher.config.sizes import accumulation_steps, shard_ranks, world_size
from launcher.errors import ConfigurationError
from tests.unit.configs import good_config


def problems(num_gpus: int = 0, **changes: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        check(good_config(**changes), num_gpus)
    return str(caught.value)


def test_a_good_configuration_passes_without_warnings() -> None:
    assert check(good_config(), num_gpus=0) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a/b"}, ["name='a/b'", "letters"]),
        ({"name": ""}, ["name=''"]),
        ({"name": "../up"}, ["name='../up'"]),
        ({"seed": -1}, ["seed=-1", "2^63"]),
        ({"seed": 2**63}, [f"seed={2**63}"]),
        ({"job": {"_target_": None}}, ["There is no job", "+experiment=digits"]),
        ({"optimizer": {"_target_": None}}, ["optimizer._target_", "adamw"]),
        ({"train__max_steps": 0}, ["train.max_steps=0", "at least 1"]),
        ({"train__max_steps": None, "train__max_epochs": 0}, ["train.max_epochs=0"]),
        ({"train__micro_batch_size": 0}, ["train.micro_batch_size=0"]),
        ({"train__global_batch_size": -64}, ["train.global_batch_size=-64"]),
        ({"train__global_batch_size": None, "train__accumulation_steps": 0}, ["train.accumulation_steps=0"]),
        ({"train__log_every": 0}, ["train.log_every=0"]),
        ({"train__eval_every": 0}, ["train.eval_every=0"]),
        ({"train__num_data_workers": -1}, ["train.num_data_workers=-1", "at least 0"]),
        ({"train__max_grad_norm": 0.0}, ["train.max_grad_norm=0.0", "greater than 0"]),
        ({"train__max_grad_norm": math.inf}, ["train.max_grad_norm=inf", "finite"]),
        ({"train__max_grad_norm": math.nan}, ["train.max_grad_norm=nan"]),
        ({"checkpoint__every_steps": 0}, ["checkpoint.every_steps=0", "at least 1"]),
        ({"checkpoint__every_minutes": 0.0}, ["checkpoint.every_minutes=0.0", "greater than 0"]),
        ({"checkpoint__keep": 0}, ["checkpoint.keep=0", "at least 1"]),
        ({"checkpoint__keep_best": -1}, ["checkpoint.keep_best=-1", "at least 0"]),
        ({"cluster__nodes": 0}, ["cluster.nodes=0"]),
        ({"cluster__nodes": 2}, ["cluster.nodes=2", "cluster.nodes=1"]),
        ({"cluster__processes_per_node": 0}, ["cluster.processes_per_node=0"]),
        ({"cluster__max_restarts": -1}, ["cluster.max_restarts=-1"]),
        ({"train__max_epochs": 1}, ["train.max_steps=100", "train.max_epochs=1", "both are", "exactly one"]),
        ({"train__max_steps": None}, ["train.max_steps=null", "train.max_epochs=null", "neither is"]),
        ({"train__micro_batch_size": None}, ["train.micro_batch_size is missing"]),
        ({"train__accumulation_steps": 2}, ["train.global_batch_size=64", "train.accumulation_steps=2", "both are"]),
        ({"train__global_batch_size": None}, ["train.global_batch_size=null", "neither is"]),
        ({"precision__loss_scale__initial": 0.0}, ["loss_scale.initial=0.0"]),
        ({"precision__loss_scale__minimum": -1.0}, ["loss_scale.minimum=-1.0"]),
        ({"precision__loss_scale__maximum": math.inf}, ["loss_scale.maximum=inf", "finite"]),
        ({"precision__loss_scale__growth_factor": 1.0}, ["growth_factor=1.0", "greater than 1"]),
        ({"precision__loss_scale__growth_factor": math.inf}, ["growth_factor=inf"]),
        ({"precision__loss_scale__backoff_factor": 1.0}, ["backoff_factor=1.0", "between 0 and 1"]),
        ({"precision__loss_scale__backoff_factor": 0.0}, ["backoff_factor=0.0"]),
        ({"precision__loss_scale__growth_interval": 0}, ["growth_interval=0"]),
        ({"precision__loss_scale__hysteresis": 0}, ["hysteresis=0"]),
        ({"precision__loss_scale__patience": 0}, ["patience=0"]),
        (
            {"precision__loss_scale__enabled": True, "precision__loss_scale__maximum": 1024.0},
            ["initial=65536.0", "minimum=1.0", "maximum=1024.0"],
        ),
        (
            {"precision__loss_scale__enabled": True, "precision__loss_scale__initial": 0.5},
            ["initial=0.5", "minimum=1.0"],
        ),
        ({"optimizer__lr": None}, ["optimizer.lr=None"]),
        ({"optimizer__lr": "fast"}, ["optimizer.lr='fast'"]),
        ({"optimizer__lr": True}, ["optimizer.lr=True"]),
        ({"optimizer__lr": -1e-3}, ["optimizer.lr=-0.001"]),
        ({"optimizer__lr": math.nan}, ["optimizer.lr=nan"]),
        ({"schedule__warmup_steps": -1}, ["schedule.warmup_steps=-1"]),
        ({"schedule__final_fraction": 1.5}, ["schedule.final_fraction=1.5"]),
        ({"schedule__final_fraction": math.nan}, ["schedule.final_fraction=nan"]),
        ({"parallel__shard_size": 2}, ["parallel.shard_size=2", "hsdp"]),
        ({"parallel__shard_size": 0, "parallel__strategy": "hsdp"}, ["parallel.shard_size=0"]),
        (
            {"parallel__shard_size": 4, "parallel__strategy": "hsdp", "cluster__processes_per_node": 2},
            ["parallel.shard_size=4", "2 worker(s)", "Valid: 1, 2."],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    message = problems(**changes)
    for word in words:
        assert word in message
    assert message.count("\n") == 0, "one mistake gives one line"


def test_several_problems_are_reported_at_once() -> None:
    lines = problems(name="a b", train__max_steps=None, train__global_batch_size=65, optimizer__lr=-1).splitlines()
    assert [line.split("=")[0] for line in lines] == [
        "name",
        "train.max_steps",
        "train.global_batch_size",
        "optimizer.lr",
    ]


def test_a_global_batch_that_does_not_divide_suggests_the_nearest_multiples() -> None:
    message = problems(train__global_batch_size=50)
    assert "multiple of 16" in message
    assert "Use 48 or 64," in message


def test_a_global_batch_below_one_multiple_suggests_only_the_larger() -> None:
    assert "Use 16," in problems(train__global_batch_size=10)


@given(st.integers(1, 10_000), st.integers(1, 64), st.integers(1, 16))
def test_a_suggested_global_batch_is_accepted(size: int, micro_batch_size: int, workers: int) -> None:
    config = good_config()
    config.train.global_batch_size = size
    config.train.micro_batch_size = micro_batch_size
    config.cluster.processes_per_node = workers
    try:
        check(config, 0)
    except ConfigurationError as error:
        found = re.search(r"Use ([\d or]+),", str(error))
        assert found is not None
        for suggestion in found[1].split(" or "):
            config.train.global_batch_size = int(suggestion)
            check(config, 0)
    else:
        assert accumulation_steps(config, workers) * micro_batch_size * workers == size


def test_accumulation_steps_may_be_given_instead_of_the_global_batch() -> None:
    config = good_config(train__global_batch_size=None, train__accumulation_steps=3)
    assert check(config, 0) == []
    assert accumulation_steps(config, 2) == 3
    assert world_size(config) == 2


def test_cuda_without_a_gpu_is_refused() -> None:
    assert "device=cpu" in problems(num_gpus=0, device="cuda")


def test_more_workers_than_gpus_is_refused() -> None:
    assert "use at most 1" in problems(num_gpus=1, device="cuda")
    assert check(good_config(device="cuda"), num_gpus=2) == []


def test_several_nodes_are_allowed_where_processes_exist_already() -> None:
    assert check(good_config(cluster__kind="torchrun", cluster__nodes=2), 0) == []


def test_a_replica_takes_the_ranks_of_one_node_unless_told_otherwise() -> None:
    assert shard_ranks(good_config(parallel__strategy="hsdp")) == 2
    assert shard_ranks(good_config(parallel__strategy="hsdp", parallel__shard_size=1)) == 1


def test_fp16_without_a_loss_scale_is_a_warning() -> None:
    (warning,) = check(good_config(precision__dtype="float16"), 0)
    assert "precision.loss_scale.enabled=false" in warning
    assert check(good_config(precision__dtype="float16", precision__loss_scale__enabled=True), 0) == []
    assert check(good_config(precision__dtype="bfloat16"), 0) == []


@pytest.mark.parametrize(("warmup", "count"), [(99, 0), (100, 1), (101, 1)])
def test_a_warmup_that_never_ends_is_a_warning(warmup: int, count: int) -> None:
    warnings = check(good_config(schedule__warmup_steps=warmup), 0)
    assert len(warnings) == count
    assert all(f"schedule.warmup_steps={warmup}" in warning and "max_steps=100" in warning for warning in warnings)


def test_a_best_checkpoint_of_one_validation_is_a_warning() -> None:
    (warning,) = check(good_config(checkpoint__keep_best=2), 0)
    assert "checkpoint.keep_best=2 has no effect without train.eval_every" in warning
    assert check(good_config(checkpoint__keep_best=2, train__eval_every=10), 0) == []


def test_a_final_fraction_without_decay_is_a_warning() -> None:
    assert "no effect" in check(good_config(schedule__final_fraction=0.1), 0)[0]
    assert check(good_config(schedule__final_fraction=0.1, schedule__decay="linear"), 0) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"codec": "powersgd", "strategy": "fsdp"},
            ["compression=powersgd with parallel=fsdp", "only rows", "compression=int8, fp16 or bf16", "ddp or hsdp"],
        ),
        ({"codec": "powersgd", "strategy": "zero2"}, ["compression=powersgd with parallel=zero2"]),
        (
            {"codec": "powersgd", "strategy": "hsdp", "axis": "all"},
            ["compression.axis=all with compression=powersgd", "compression.axis=replica"],
        ),
        (
            {"codec": "int8", "strategy": "fsdp", "axis": "replica"},
            ["compression.axis=replica with parallel=fsdp", "compression.axis=all, or parallel=hsdp"],
        ),
        ({"codec": "fp16", "strategy": "zero2", "axis": "replica"}, ["compression.axis=replica with parallel=zero2"]),
        (
            {"codec": "fp16", "accumulate": "wire", "error_feedback": True},
            ["compression.error_feedback=true", "compression.accumulate=wire", "compression.accumulate=fp32"],
        ),
        ({"codec": "bf16", "accumulate": "wire", "error_feedback": True}, ["compression.error_feedback=true"]),
        ({"codec": "int8", "block_size": 6}, ["compression.block_size=6", "multiple of 4", "128"]),
        ({"codec": "int8", "block_size": 0}, ["compression.block_size=0"]),
        ({"codec": "int8", "block_size": 100_000_000}, ["compression.block_size=100000000", "65536"]),
        ({"codec": "powersgd", "rank": 0}, ["compression.rank=0", "at least 1"]),
        ({"codec": "powersgd", "start_step": 1}, ["compression.start_step=1", "at least 2"]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_codec_that_cannot_go_with_a_strategy_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    strategy = changes.pop("strategy", "ddp")
    message = problems(
        parallel__strategy=strategy, **{f"compression__{name}": value for name, value in changes.items()}
    )
    for word in words:
        assert word in message
    assert message.count("\n") == 0


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp", "hsdp"])
@pytest.mark.parametrize("codec", ["none", "fp16", "bf16", "int8", "powersgd"])
def test_every_other_pair_passes(strategy: str, codec: str) -> None:
    config = good_config(parallel__strategy=strategy, compression__codec=codec, precision__loss_scale__enabled=True)
    config.parallel.shard_size = 1 if strategy == "hsdp" else None
    if codec == "powersgd" and strategy in ("zero2", "fsdp"):
        with pytest.raises(ConfigurationError):
            check(config, 0)
    else:
        assert check(config, 0) == []


def test_options_of_another_codec_do_not_matter() -> None:
    assert check(good_config(compression__codec="none", compression__block_size=6), 0) == []
    assert check(good_config(compression__codec="none", compression__axis="replica"), 0) == []


def test_fp16_on_the_wire_without_a_loss_scale_is_a_warning() -> None:
    (warning,) = check(good_config(compression__codec="fp16"), 0)
    assert "compression=fp16 without a loss scale" in warning
    assert "compression=bf16" in warning


def test_a_codec_for_one_worker_is_a_warning() -> None:
    (warning,) = check(good_config(compression__codec="int8", cluster__processes_per_node=1), 0)
    assert "compression=int8 has no effect" in warning


def test_a_codec_between_replicas_of_which_there_is_one_is_a_warning() -> None:
    (warning,) = check(good_config(parallel__strategy="hsdp", compression__codec="int8"), 0)
    assert "compression=int8 has no effect between replicas" in warning
    assert "parallel.shard_size" in warning

"""A codec on models, groups and loops that are not as T-minus makes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from launcher.compression import attach
from launcher.compression.links import Team
from launcher.compression.trainers import Trainers
from launcher.errors import ConfigurationError, JobError
from tests.ranks import reducing
from tests.ranks.processes import COLLECTIVE_SECONDS, Ranks
from tests.ranks.reducing import Given, backward, drawn, exact_mean, gradients, replicated

SHAPES = ((40, 12), (17,))


def seconds_of_a_team(rank: int) -> float:
    team = Team(dist.group.WORLD, torch.device("cpu"))
    group: Any = team.group
    return float(group.options._timeout.total_seconds())


def test_a_team_waits_as_long_as_the_group_that_it_was_made_from(pools: dict[int, Ranks]) -> None:
    assert pools[2].run(seconds_of_a_team) == [COLLECTIVE_SECONDS] * 2


def taken_up_on_a_subgroup(rank: int) -> bool:
    """Two pairs of ranks, each with a model of its own; one pair alone loads what it has saved."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[rank // 2]

    def build() -> tuple[Any, Any]:
        model = replicated(Given(SHAPES), process_group=group)
        return model, attach(model, "int8")

    model, wire = build()
    wire.begin(torch.tensor(1.0))
    backward(model, drawn(rank, 0, SHAPES))
    wire.conclude(torch.tensor(0.0))
    states: list[Any] = [None, None]
    dist.all_gather_object(states, {key: value.clone() for key, value in wire.state_dict().items()}, group=group)
    _, other = build()
    if rank >= 2:
        other.load_state_dict(lambda saved_rank: states[saved_rank], 2)
        same = {key: value.tolist() for key, value in other.state_dict().items()}
        return same == {key: value.tolist() for key, value in states[rank - 2].items()}
    return True


def test_a_model_on_some_of_the_ranks_takes_up_its_own_state(pools: dict[int, Ranks]) -> None:
    assert all(pools[4].run(taken_up_on_a_subgroup))


def attached_by_ranks_of_unequally_many_groups(rank: int, kind: str) -> list[float]:
    """Where torch's ``new_group`` among its members alone would have another name on each: the largest errors."""
    own_groups = [dist.new_group(members) for members in ([0], [0, 1])]
    found = []
    for codec, options in (("int8", {}), ("fp16", {"accumulate": "wire"}), ("powersgd", {"start_step": 2})):
        if kind == "hsdp":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
            model: Any = fully_shard(Given(SHAPES), mesh=mesh)
        else:
            model = replicated(Given(SHAPES))
        with reducing.hosts(rank, 2):
            wire = attach(model, codec, **options)
        backward(model, drawn(rank, 0, SHAPES))
        means = [each.double() for each in gradients(model) if each is not None]
        pairs = zip(means, exact_mean(4, 0, SHAPES), strict=True)
        found.append(max((each - exact).abs().max().item() for each, exact in pairs))
        for step in range(1, 4):
            backward(model, drawn(rank, step, SHAPES))
        own = {key: value.clone() for key, value in wire.state_dict().items()}
        wire.load_state_dict(lambda saved_rank, own=own: own, 4)
        assert all(torch.equal(own[key], value) for key, value in wire.state_dict().items())
    for group in own_groups:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    return found


def agreed(rank: int) -> list[Any]:
    """What the ranks of a mesh of two dimensions, and of a group, know of themselves; the votes of one that differs."""
    device = torch.device("cpu")
    pair = dist.new_group([rank - rank % 2, rank - rank % 2 + 1], use_local_synchronization=True)
    found: list[Any] = []
    for trainers in (
        Trainers.of_mesh(init_device_mesh("cpu", (2, 2))),
        Trainers.of_group(pair),
        Trainers.of_group(None),
    ):
        votes = [trainers.all_agree(rank != dissenter, device) for dissenter in range(5)]
        found.append((trainers.size, trainers.rank, votes))
    return found


def test_one_rank_that_does_not_agree_is_heard_by_all_that_train_with_it(pools: dict[int, Ranks]) -> None:
    nobody = [False] * 4 + [True]
    for rank, (mesh, pair, everybody) in enumerate(pools[4].run(agreed)):
        assert mesh == everybody == (4, rank, nobody)
        assert pair == (2, rank % 2, [dissenter // 2 != rank // 2 for dissenter in range(5)])


def test_a_process_alone_agrees_with_itself() -> None:
    assert Trainers.of_group(None) == Trainers(1, 0, ())
    assert Trainers().all_agree(True, torch.device("cpu"))
    assert not Trainers().all_agree(False, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["ddp", "hsdp"])
def test_ranks_may_be_in_unequally_many_groups(pools: dict[int, Ranks], kind: str) -> None:
    for eight_bits, sixteen, low_rank in pools[4].run(attached_by_ranks_of_unequally_many_groups, kind):
        assert eight_bits < 0.1
        assert sixteen < 0.01
        assert low_rank < 1e-6, "it has not started"


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
        self.real = nn.Parameter(torch.zeros(4))


def refused_complex(rank: int) -> str:
    with pytest.raises(JobError) as refusal:
        attach(DistributedDataParallel(Complex()), "int8")
    return str(refusal.value)


def test_a_complex_parameter_is_refused_by_name(pools: dict[int, Ranks]) -> None:
    for message in pools[2].run(refused_complex):
        assert message.startswith("The parameter phase is complex")


def refused_sparse(rank: int) -> str:
    with pytest.raises(JobError) as refusal:
        attach(DistributedDataParallel(nn.Sequential(nn.Embedding(9, 4, sparse=True))), "int8")
    return str(refusal.value)


def test_sparse_gradients_are_refused_by_name(pools: dict[int, Ranks]) -> None:
    for message in pools[2].run(refused_sparse):
        assert message.startswith("The gradient of 0 (Embedding) is sparse")


def refused_replicated(rank: int) -> str:
    model = nn.Linear(4, 4)
    replicate(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ConfigurationError) as refusal:
        attach(model, "int8")
    return str(refusal.value)


def test_what_fsdp2_replicates_is_refused(pools: dict[int, Ranks]) -> None:
    for message in pools[2].run(refused_replicated):
        assert "wrap it in DistributedDataParallel" in message


def refused_twice(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for part in (model[0], model):
        fully_shard(part, mesh=mesh)
    attach(model[0], "int8")
    with pytest.raises(ConfigurationError) as refusal:
        attach(model, "int8")
    return str(refusal.value)


def test_a_model_of_which_a_part_has_a_codec_is_refused(pools: dict[int, Ranks]) -> None:
    for message in pools[2].run(refused_twice):
        assert "has a codec already" in message


def refused_hooked(rank: int) -> str:
    model = DistributedDataParallel(nn.Linear(4, 4))
    model.register_comm_hook(None, allreduce_hook)
    with pytest.raises(ConfigurationError) as refusal:
        attach(model, "int8")
    return str(refusal.value)


def test_a_model_with_a_hook_of_its_own_is_refused(pools: dict[int, Ranks]) -> None:
    for message in pools[2].run(refused_hooked):
        assert "has a communication hook already" in message


def with_uneven_steps(rank: int) -> float:
    """One rank more steps than the other, in torch's context for that; a weight in the end."""
    model = replicated(Given(SHAPES))
    attach(model, "int8")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with model.join():
        for step in range(2 + rank):
            optimizer.zero_grad()
            backward(model, drawn(rank, step, SHAPES))
            optimizer.step()
    return float(model.module.parts[0][0, 0])


def test_ranks_may_run_out_of_data_within_torchs_join(pools: dict[int, Ranks]) -> None:
    weights = pools[2].run(with_uneven_steps)
    assert weights[0] == weights[1] != 0


def in_two_types(rank: int, codec: str) -> float:
    """Parameters of BF16 beside FP32: the largest error of a mean, relative."""
    shapes = ((64, 48), (64, 48))
    given = Given(shapes)
    given.parts[1] = nn.Parameter(given.parts[1].bfloat16())
    model = DistributedDataParallel(given)
    attach(model, codec, **({"start_step": 2, "rank": 48} if codec == "powersgd" else {}))
    worst = 0.0
    for step in range(4):
        model.zero_grad()
        backward(model, drawn(rank, step, shapes))
        for found, mean in zip(gradients(model), exact_mean(2, step, shapes), strict=True):
            assert found is not None
            worst = max(worst, ((found.double() - mean).norm() / mean.norm()).item())
    return worst


@pytest.mark.parametrize("codec", ["int8", "powersgd"])
def test_parameters_of_two_types_go_side_by_side(pools: dict[int, Ranks], codec: str) -> None:
    assert max(pools[2].run(in_two_types, codec)) < 0.03


class Vanished:
    """A scaler whose scale has gone down to nothing, as torch's can."""

    scale = 1.0

    def get_scale(self) -> float:
        return self.scale


def with_a_scale_of_zero(rank: int) -> list[float]:
    scaler, model = Vanished(), replicated(Given(SHAPES))
    wire = attach(model, "int8", scaler=scaler)
    found = []
    for step in range(4):
        scaler.scale = 0.0 if step == 1 else 1.0
        model.zero_grad(set_to_none=True)
        backward(model, drawn(rank, step, SHAPES), scaler.scale)
        found.append(max(each.abs().max().item() for each in gradients(model) if each is not None))
    errors = wire.state_dict()
    return [*found, max(value.abs().max().item() for key, value in errors.items() if not key.startswith("weight"))]


def test_a_loss_scale_of_zero_does_not_spoil_what_is_kept(pools: dict[int, Ranks]) -> None:
    for *steps, error in pools[2].run(with_a_scale_of_zero):
        assert all(torch.isfinite(torch.tensor(steps)))
        assert steps[1] == 0
        assert 0 < error < 0.1


ALONE = """
import os, signal, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from launcher.compression import attach

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=4))
model = DistributedDataParallel(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))), bucket_cap_mb=0.01)
attach(model, "int8")
for step in range(4):
    if rank == 1 and step == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    model(torch.randn(4, 64)).square().mean().backward()
"""


def test_a_peer_that_stops_answering_is_an_error_after_the_groups_timeout(tmp_path: Path) -> None:
    program, store = tmp_path / "alone.py", tmp_path / "store"
    program.write_text(ALONE)
    command = [sys.executable, str(program)]
    stopped = subprocess.Popen([*command, "1", str(store)])
    try:
        ended = subprocess.run([*command, "0", str(store)], capture_output=True, text=True, timeout=60, check=False)
    finally:
        stopped.kill()
        stopped.wait()
    assert ended.returncode == 1, ended.stderr  # no abort either, while Python is taken down
    assert "RuntimeError" in ended.stderr

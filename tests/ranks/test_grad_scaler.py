"""One rank overflows and all skip, whatever the gradients are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from launcher.errors import JobError
from launcher.precision import DistributedGradScaler
from tests.ranks.processes import Ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(120)]

SCALE = 1024.0
OPTIMIZERS = ["sgd", "fused_sgd", "adam", "fused_adam"]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


def make_optimizer(kind: str, parameters: list[Tensor]) -> torch.optim.Optimizer:
    fused = kind.startswith("fused")
    if kind.endswith("sgd"):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=fused)
    if kind.endswith("adagrad"):
        return torch.optim.Adagrad(parameters, lr=0.1, fused=fused)
    return torch.optim.Adam(parameters, lr=0.1, fused=fused)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded(mesh: DeviceMesh, placements: list[Any], value: float = 1.0, size: int = 2) -> DTensor:
    """Every rank's part is (size,), whatever the placements."""
    return DTensor.from_local(torch.full((size,), value), mesh, placements, run_check=False)


def attempt(
    scaler: DistributedGradScaler,
    optimizer: torch.optim.Optimizer,
    gradients: dict[Tensor, Tensor | None],
    unscale: bool = False,
) -> dict[str, Any]:
    """One iteration with given (scaled) gradients: what this rank did, and how many collectives it made."""
    before = [local(parameter.detach()).clone() for parameter in gradients]
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    with CommDebugMode() as communication:
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    after = [local(parameter.detach()) for parameter in gradients]
    optimizer.zero_grad()
    return {
        "changed": [not torch.equal(old, new) for old, new in zip(before, after, strict=True)],
        "finite": all(bool(new.isfinite().all()) for new in after),
        "scale": scaler.get_scale(),
        "collectives": communication.get_total_counts(),
    }


def new_scaler(**arguments: Any) -> DistributedGradScaler:
    scaler = DistributedGradScaler("cpu", init_scale=SCALE, **arguments)
    scaler.scale(torch.zeros(()))
    return scaler


def assert_all_skip_then_all_step(results: list[list[dict[str, Any]]]) -> None:
    for overflowed, clean in results:
        assert not any(overflowed["changed"])
        assert overflowed["scale"] == SCALE / 2
        assert clean["scale"] == SCALE / 2
        assert all(clean["changed"])
        assert clean["finite"]
        assert overflowed["collectives"] == clean["collectives"] == 1


def plain_on_each_rank(rank: int, kind: str, unscale: bool) -> list[dict[str, Any]]:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer, scaler = make_optimizer(kind, parameters), new_scaler()
    value = math.inf if rank == 1 else SCALE
    first = attempt(
        scaler, optimizer, {parameters[0]: torch.full((3,), SCALE), parameters[1]: torch.full((2,), value)}, unscale
    )
    clean = attempt(scaler, optimizer, {p: torch.full_like(p, scaler.get_scale()) for p in parameters}, unscale)
    return [first, clean]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_plain_gradients_with_inf_on_one_rank_and_all_skip(two: Ranks, kind: str, unscale: bool) -> None:
    assert_all_skip_then_all_step(two.run(plain_on_each_rank, kind, unscale))


def placed(rank: int, kind: str, placement: str) -> list[dict[str, Any]]:
    mesh = init_device_mesh("cpu", (2,))
    of_parameter = {"shard": Shard(0), "replicate": Replicate(), "partial": Replicate()}[placement]
    of_gradient = Partial() if placement == "partial" else of_parameter
    parameter = nn.Parameter(sharded(mesh, [of_parameter]))
    optimizer, scaler = make_optimizer(kind, [parameter]), new_scaler()
    bad = math.nan if rank == 1 else 1.0
    first = attempt(scaler, optimizer, {parameter: sharded(mesh, [of_gradient], bad)})
    second = attempt(scaler, optimizer, {parameter: sharded(mesh, [of_gradient], SCALE)})
    if placement == "partial":  # torch sums the parts inside the optimizer: its collective, not the scaler's
        second["collectives"] = 1
    return [first, second]


@pytest.mark.parametrize("placement", ["shard", "replicate"])
@pytest.mark.parametrize("kind", [*OPTIMIZERS, "fused_adagrad"])
def test_dtensor_gradients_with_nan_on_one_rank_and_all_skip(two: Ranks, kind: str, placement: str) -> None:
    assert_all_skip_then_all_step(two.run(placed, kind, placement))


def test_partial_gradients_with_nan_in_one_ranks_part_and_all_skip(two: Ranks) -> None:
    assert_all_skip_then_all_step(two.run(placed, "sgd", "partial"))


def mixed(rank: int, kind: str, bad_index: int) -> list[dict[str, Any]]:
    mesh = init_device_mesh("cpu", (2,))
    parameters = [nn.Parameter(sharded(mesh, [Shard(0)])), nn.Parameter(torch.ones(3))]
    optimizer, scaler = make_optimizer(kind, parameters), new_scaler()

    def gradients(bad: float) -> dict[Tensor, Tensor | None]:
        values = [SCALE, SCALE]
        values[bad_index] = bad
        return {
            parameters[0]: sharded(mesh, [Shard(0)], values[0]),
            parameters[1]: torch.full((3,), values[1]),
        }

    return [
        attempt(scaler, optimizer, gradients(math.inf if rank == 0 else SCALE)),
        attempt(scaler, optimizer, gradients(SCALE)),
    ]


@pytest.mark.parametrize("bad_index", [0, 1], ids=["inf_in_dtensor", "inf_in_plain"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dtensor_and_plain_gradients_in_one_optimizer(two: Ranks, kind: str, bad_index: int) -> None:
    assert_all_skip_then_all_step(two.run(mixed, kind, bad_index))


def two_meshes(rank: int, kind: str, bad_rank: int) -> list[dict[str, Any]]:
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    parameters = [
        nn.Parameter(sharded(whole["inner"], [Shard(0)])),
        nn.Parameter(sharded(whole, [Replicate(), Shard(0)])),
    ]
    optimizer, scaler = make_optimizer(kind, parameters), new_scaler()

    def gradients(value: float) -> dict[Tensor, Tensor | None]:
        return {
            parameters[0]: sharded(whole["inner"], [Shard(0)], SCALE),
            parameters[1]: sharded(whole, [Replicate(), Shard(0)], value),
        }

    return [
        attempt(scaler, optimizer, gradients(math.inf if rank == bad_rank else SCALE)),
        attempt(scaler, optimizer, gradients(SCALE)),
    ]


@pytest.mark.parametrize("bad_rank", [0, 3])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_first_gradient_on_a_sub_mesh_and_inf_elsewhere(four: Ranks, kind: str, bad_rank: int) -> None:
    assert_all_skip_then_all_step(four.run(two_meshes, kind, bad_rank))


def sub_mesh_of_some_ranks(rank: int, kind: str) -> list[dict[str, Any]]:
    part, whole = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2, 3])
    parameters = [nn.Parameter(sharded(whole, [Shard(0)]))]
    if rank < 2:
        parameters.insert(0, nn.Parameter(sharded(part, [Shard(0)])))
    optimizer, scaler = make_optimizer(kind, parameters), new_scaler()

    def gradients(value: float) -> dict[Tensor, Tensor | None]:
        of_part = {parameters[0]: sharded(part, [Shard(0)], SCALE)} if rank < 2 else {}
        return {**of_part, parameters[-1]: sharded(whole, [Shard(0)], value)}

    return [
        attempt(scaler, optimizer, gradients(math.inf if rank == 3 else SCALE)),
        attempt(scaler, optimizer, gradients(SCALE)),
    ]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_parameter_that_only_some_ranks_hold(four: Ranks, kind: str) -> None:
    assert_all_skip_then_all_step(four.run(sub_mesh_of_some_ranks, kind))


def no_gradient_on_one_rank(rank: int, kind: str, bad: float) -> dict[str, Any]:
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = make_optimizer(kind, [parameter]), new_scaler()
    return attempt(scaler, optimizer, {parameter: None if rank == 1 else torch.full((2,), bad)})


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_without_gradient_on_one_rank_takes_part(two: Ranks, kind: str) -> None:
    for bad, expected in [(math.inf, SCALE / 2), (SCALE, SCALE)]:
        results = two.run(no_gradient_on_one_rank, kind, bad)
        assert [result["scale"] for result in results] == [expected] * 2
        assert [result["changed"] for result in results] == [[math.isfinite(bad)], [False]]
        assert [result["collectives"] for result in results] == [1, 1]


def unscale_after_load(rank: int) -> dict[str, Any]:
    state = torch.amp.GradScaler("cpu", init_scale=64.0).state_dict()
    scaler = DistributedGradScaler("cpu", hysteresis=2)
    scaler.load_state_dict(state)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    return attempt(scaler, optimizer, {parameter: torch.full((2,), math.inf if rank else 64.0)}, unscale=True)


def test_unscale_right_after_load_state_dict(two: Ranks) -> None:
    for result in two.run(unscale_after_load):
        assert result["scale"] == 64.0  # the first overflow is tolerated
        assert result["changed"] == [False]


def nan_run(rank: int, minimum: float) -> dict[str, Any]:
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.AdamW([parameter], lr=0.1, fused=True), new_scaler(minimum=minimum)
    for _ in range(200):
        bad = attempt(scaler, optimizer, {parameter: torch.full((2,), math.nan if rank else 1.0)})
        assert not bad["changed"][0]
    return attempt(scaler, optimizer, {parameter: torch.ones(2)})


def test_200_nan_steps_and_a_clean_one_with_a_floor(two: Ranks) -> None:
    for result in two.run(nan_run, 1.0):
        assert result["scale"] == 1.0
        assert result["finite"]
        assert result["changed"] == [True]


def test_200_nan_steps_and_a_clean_one_without_a_floor_write_no_nan(two: Ranks) -> None:
    for result in two.run(nan_run, 0.0):
        assert result["finite"]
        assert result["changed"] == [False]


def clean_run(rank: int) -> dict[str, Any]:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    scaler = new_scaler(growth_interval=1, maximum=2.0**24)
    for _ in range(300):
        result = attempt(scaler, optimizer, {parameter: torch.full((2,), scaler.get_scale())})
        assert result["changed"] == [True]
    return result


def test_300_growing_steps_with_a_ceiling(two: Ranks) -> None:
    assert [result["scale"] for result in two.run(clean_run)] == [2.0**24] * 2


def refused_on_one_rank(rank: int) -> dict[str, Any]:
    parameter = nn.Parameter(torch.ones(4, 2))
    optimizer, scaler = torch.optim.SGD([parameter], lr=1.0), new_scaler()
    parameter.grad = torch.ones(4, 2).to_sparse() if rank == 0 else torch.ones(4, 2)
    message = ""
    try:
        scaler.step(optimizer)
    except JobError as error:
        message = str(error)
    return {"message": message, "unchanged": bool((parameter == 1).all())}


def test_a_sparse_gradient_on_one_rank_fails_there_and_hangs_nobody(two: Ranks) -> None:
    first, second = two.run(refused_on_one_rank)
    assert "(4, 2) is sparse" in first["message"]
    assert second["message"] == ""
    assert first["unchanged"]
    assert second["unchanged"]


def within_a_group(rank: int) -> dict[str, Any]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = new_scaler(process_group=groups[rank // 2])
    return attempt(scaler, optimizer, {parameter: torch.full((2,), math.inf if rank == 3 else SCALE)})


def test_the_flag_stays_in_its_process_group(four: Ranks) -> None:
    assert [result["scale"] for result in four.run(within_a_group)] == [SCALE, SCALE, SCALE / 2, SCALE / 2]


def two_optimizers(rank: int) -> list[float]:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizers = [make_optimizer("fused_adam", [parameters[0]]), make_optimizer("sgd", [parameters[1]])]
    scaler = new_scaler()
    parameters[0].grad = torch.full((2,), math.inf if rank == 0 else SCALE)
    parameters[1].grad = torch.full((2,), SCALE)
    with CommDebugMode() as communication:
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    return [scaler.get_scale(), float(communication.get_total_counts()), *(float(p[0].item()) for p in parameters)]


def test_two_optimizers_decide_apart_and_share_the_scale(two: Ranks) -> None:
    for scale, collectives, first, second in two.run(two_optimizers):
        assert (scale, collectives, first) == (SCALE / 2, 2, 1.0)
        assert second == pytest.approx(0.9)


def absent_from_the_mesh(rank: int) -> list[dict[str, Any]]:
    part, whole = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2, 3])
    size = 2 if rank < 2 else 0  # ranks outside of a mesh hold empty parts
    parameters = [nn.Parameter(sharded(part, [Shard(0)], size=size)), nn.Parameter(sharded(whole, [Shard(0)]))]
    optimizer, scaler = make_optimizer("sgd", parameters), new_scaler()

    def gradients(value: float) -> dict[Tensor, Tensor | None]:
        return {
            parameters[0]: sharded(part, [Shard(0)], value, size=size),
            parameters[1]: sharded(whole, [Shard(0)], SCALE),
        }

    results = [
        attempt(scaler, optimizer, gradients(math.inf if rank == 0 else SCALE)),
        attempt(scaler, optimizer, gradients(SCALE)),
    ]
    if size == 0:
        results[1]["changed"] = results[1]["changed"][1:]
    return results


def test_ranks_outside_of_the_first_gradients_mesh_skip_too(four: Ranks) -> None:
    assert_all_skip_then_all_step(four.run(absent_from_the_mesh))


def fully_sharded(rank: int, kind: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float16))
    optimizer, scaler = make_optimizer(kind, list(model.parameters())), new_scaler()
    results = []
    for factor in (1e30 if rank == 2 else 1.0, 1.0):
        before = [local(parameter.detach()).clone() for parameter in model.parameters()]
        scaler.scale(model(torch.full((1, 4), factor)).mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = [local(parameter.detach()) for parameter in model.parameters()]
        results.append({"same": all(map(torch.equal, before, after)), "scale": scaler.get_scale()})
    return results


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_hsdp_with_clipping(four: Ranks, kind: str) -> None:
    for result in four.run(fully_sharded, kind):
        assert result == [{"same": True, "scale": SCALE / 2}, {"same": False, "scale": SCALE / 2}]

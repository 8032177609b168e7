"""What sharding would break is refused before anything is sharded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from launcher.errors import JobError
from launcher.parallel.blocks import refuse_unshardable


def model() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2)), nn.Linear(3, 3))


def norms(of: nn.Module) -> list[nn.Module]:
    return [part for part in of.modules() if isinstance(part, nn.BatchNorm1d)]


def test_parts_inside_a_block_may_be_sharded_by_themselves() -> None:
    found = model()
    refuse_unshardable(found, [*norms(found), found[0], found[1]], "Job")


def test_weights_tied_within_one_unit_are_fine() -> None:
    found = model()
    found[2].weight = nn.Linear(3, 3).weight
    found.append(nn.Linear(3, 3))
    found[3].weight = found[2].weight
    refuse_unshardable(found, [found[0], found[1]], "Job")


@pytest.mark.parametrize(("one", "other"), [("0.0", "1.0"), ("0.0", "2")])
def test_weights_tied_between_units_are_refused_by_name(one: str, other: str) -> None:
    found = model()
    found.get_submodule(other).weight = found.get_submodule(one).weight
    with pytest.raises(JobError, match=rf"Job: the parameter {one}.weight is shared between two blocks, or"):
        refuse_unshardable(found, [*norms(found), found[0], found[1]], "Job")


def test_a_part_that_two_blocks_have_is_refused() -> None:
    found = model()
    found[1][0] = found[0][0]
    with pytest.raises(JobError, match=r"0\.0\.weight is shared"):
        refuse_unshardable(found, [found[0], found[1]], "Job")


def test_a_scalar_parameter_is_refused_by_name() -> None:
    found = model()
    found.register_parameter("gain", nn.Parameter(torch.ones(())))
    with pytest.raises(JobError, match="gain have no dimension"):
        refuse_unshardable(found, [], "Job")


def test_parameters_of_two_types_in_one_unit_are_refused_by_name() -> None:
    found = model()
    found[1].bfloat16()
    refuse_unshardable(found, [found[0], found[1]], "Job")
    found[2].bias.requires_grad_(False).data = found[2].bias.bfloat16()  # FSDP2 asks about what is trained
    refuse_unshardable(found, [found[0], found[1]], "Job")
    with pytest.raises(JobError, match=r"1\..* of bfloat16 and .* of float32|.* of float32 and 1\..* of bfloat16"):
        refuse_unshardable(found, [found[0]], "Job")


def test_a_parameter_without_elements_is_refused_by_name_unless_it_is_frozen() -> None:
    found = model()
    found.register_parameter("none", nn.Parameter(torch.ones(0, 3)))
    with pytest.raises(JobError, match=r"none have no elements"):
        refuse_unshardable(found, [], "Job")
    found.none.requires_grad_(False)
    refuse_unshardable(found, [], "Job")

"""The digest of a model is one of its values, not of how they are stored."""

from __future__ import annotations

import torch
from torch import nn

from launcher.training.digest import parameters_digest


class Parameters(nn.Module):
    """Some parameters by name."""

    def __init__(self, **values: torch.Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))


def digest(**values: torch.Tensor) -> str:
    return parameters_digest(Parameters(**values))


VALUES = torch.arange(6.0).reshape(2, 3)


def test_the_same_values_have_the_same_digest() -> None:
    assert digest(a=VALUES) == digest(a=VALUES.clone())
    assert len(digest(a=VALUES)) == 64


def test_one_changed_bit_changes_the_digest() -> None:
    changed = VALUES.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    assert digest(a=changed) != digest(a=VALUES)


def test_the_layout_in_memory_does_not_matter() -> None:
    assert digest(a=VALUES.t().contiguous().t()) == digest(a=VALUES)
    assert digest(a=VALUES.t()) != digest(a=VALUES), "the order of values does"


def test_a_type_that_holds_the_same_values_does_not_matter() -> None:
    assert digest(a=VALUES.bfloat16()) == digest(a=VALUES) == digest(a=VALUES.double())


def test_the_order_in_which_parameters_were_made_does_not_matter() -> None:
    one, two = torch.ones(1), torch.full((1,), 2.0)
    assert digest(a=one, b=two) == digest(b=two, a=one)
    assert digest(a=one, b=two) != digest(a=two, b=one)


def test_tied_weights_count_once() -> None:
    tied = Parameters(a=VALUES)
    tied.register_parameter("b", tied.a)
    assert parameters_digest(tied) == digest(a=VALUES)
    assert digest(a=VALUES, b=VALUES.clone()) != digest(a=VALUES)


def test_scalars_and_empty_parameters_have_a_digest() -> None:
    assert digest(a=torch.tensor(2.0)) != digest(a=torch.tensor(3.0))
    assert digest(a=VALUES, empty=torch.empty(0, 3)) == digest(a=VALUES)
    assert digest(empty=torch.empty(0)) == digest()

"""Weights to begin with: all of the model's, and nothing else; the rest is one message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from launcher.errors import RequestError
from launcher.parallel.initial import load_initial_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("left_out", [None, "first.weight", "second.weight"])
def test_one_name_of_tied_weights_is_enough(tmp_path: Path, left_out: str | None) -> None:
    source, model = Tied(), Tied()
    source.norm.running_mean += 3
    content = weights(source)
    content.pop(left_out or "", None)
    save_file(content, tmp_path / "file")
    load_initial_weights(model, tmp_path / "file")
    assert model.second.weight is model.first.weight
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


class Remembering(nn.Module):
    """Extra state that is a tensor, and no view of what it keeps."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 1)
        self.value = value

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.value])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.value = state.item()


@pytest.mark.parametrize("has_it", [True, False])
def test_extra_state_is_handed_over_if_the_file_has_it(tmp_path: Path, has_it: bool) -> None:
    source, model = nn.Sequential(Remembering(3.0)), nn.Sequential(Remembering(1.0))
    content = weights(source)
    if not has_it:
        del content["0._extra_state"]
    save_file(content, tmp_path / "file")
    load_initial_weights(model, tmp_path / "file")
    assert model[0].value == (3.0 if has_it else 1.0)
    assert torch.equal(model[0].inner.weight, source[0].inner.weight)


def test_half_precision_weights_are_taken_as_fp32(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    halves = {name: value.bfloat16() for name, value in weights(nn.Linear(2, 2)).items()}
    save_file(halves, tmp_path / "file")
    load_initial_weights(model, tmp_path / "file")
    assert model.weight.dtype is torch.float32
    assert torch.equal(model.weight, halves["weight"].float())


def test_everything_that_does_not_fit_is_in_one_message_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = weights(model)
    content = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(4), "1.weight": torch.ones(1, 3), "x": torch.ones(1)}
    save_file(content, tmp_path / "file")
    with pytest.raises(RequestError) as caught:
        load_initial_weights(model, tmp_path / "file")
    message = str(caught.value)
    assert "missing in the file: 1.bias" in message
    assert "not in the model: x" in message
    assert "of another shape: 0.bias ([4] in the file, [3] in the model)" in message
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for name in ("file", "absent"):
        with pytest.raises(RequestError, match=f"init_from=.*{name} cannot be read"):
            load_initial_weights(nn.Linear(1, 1), tmp_path / name)


def test_tied_weights_that_differ_in_the_file_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = Tied()
    before, content = weights(model), weights(Tied())
    content["second.weight"] += 1
    save_file(content, tmp_path / "file")
    with pytest.raises(RequestError, match=r"second\.weight and first\.weight \(one and the same in the model"):
        load_initial_weights(model, tmp_path / "file")
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())


@pytest.mark.parametrize(
    ("place", "dtype", "word"),
    [("weight", torch.complex64, "C64"), ("count", torch.bfloat16, "BF16"), ("count", torch.complex64, "C64")],
)
def test_numbers_of_which_a_part_would_be_lost_are_refused(
    tmp_path: Path, place: str, dtype: torch.dtype, word: str
) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("count", torch.tensor([3]))
    content = weights(model)
    content[place] = content[place].to(dtype)
    save_file(content, tmp_path / "file")
    with pytest.raises(RequestError, match=f"{place} .{word} in the file, torch"):
        load_initial_weights(model, tmp_path / "file")


def test_whole_numbers_become_weights_and_empty_and_complex_ones_stay(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex64))
    model.register_parameter("none", nn.Parameter(torch.zeros(0, 3)))
    content = {
        "weight": torch.tensor([[1, 2]]),
        "bias": torch.ones(1, dtype=torch.float16),
        "phases": torch.tensor([1j, 2.0]),
        "none": torch.zeros(0, 3),
    }
    save_file(content, tmp_path / "file")
    load_initial_weights(model, tmp_path / "file")
    assert model.weight.tolist() == [[1.0, 2.0]]
    assert model.phases.tolist() == [1j, 2.0]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "weights.safetensors")
    with pytest.raises(RequestError, match="cannot be read: it is no file"):
        load_initial_weights(nn.Linear(2, 2), tmp_path / "weights.safetensors")

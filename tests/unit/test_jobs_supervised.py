"""The supervised job: parts from YAML, criteria of any reduction, samples of any form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launcher.jobs.supervised import SupervisedJob, num_correct
from torch import nn
from torch.utils.data import Dataset

from launcher import LossOutput
from launcher.errors import JobError
from tests.unit.job_claims import assert_sums_do_not_depend_on_the_split, assert_survives_pickling, samples_of


class Points(Dataset[Any]):
    """Nine points of four numbers in three classes, as samples of any form."""

    def __init__(self, form: str = "tuple") -> None:
        self.form = form
        self.points = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        point, label_id = self.points[index], index % 3
        forms = {"tuple": (point, label_id), "dict": {"input": point, "target": label_id}, "tensor": point}
        return forms[self.form]


def supervised(form: str = "tuple", **arguments: Any) -> SupervisedJob:
    return SupervisedJob(
        **{
            "model": {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 3},
            "train_dataset": {"_target_": f"{__name__}.Points", "form": form},
            "metrics": {"accuracy": "launcher.jobs.supervised.num_correct"},
            **arguments,
        }
    )


def loss_of(job: SupervisedJob) -> LossOutput:
    torch.manual_seed(0)
    return job.compute_loss(job.build_model(), job.collate(samples_of(job, 9)))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_every_reduction_gives_the_same_loss_output(reduction: str) -> None:
    expected = loss_of(supervised())
    criterion = {"_target_": "torch.nn.CrossEntropyLoss", "reduction": reduction}
    output = loss_of(supervised(criterion=criterion))
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.items == expected.items == 9
    assert output.metrics == expected.metrics


def test_a_dict_sample_gives_what_a_tuple_gives() -> None:
    torch.testing.assert_close(loss_of(supervised("dict")).loss, loss_of(supervised()).loss)


def test_supervised_sums_do_not_depend_on_the_split_into_batches() -> None:
    job = supervised()
    assert_sums_do_not_depend_on_the_split(job, samples_of(job, 9))


def test_a_wrong_sample_is_a_job_error_that_says_what_came() -> None:
    with pytest.raises(JobError, match=r"a tensor of shape \(9, 4\)"):
        loss_of(supervised("tensor"))


def test_a_wrong_target_key_is_a_job_error_that_lists_the_keys() -> None:
    with pytest.raises(JobError, match=r"input.*target"):
        loss_of(supervised("dict", target_key="label"))


def test_the_criterion_sees_fp32_and_no_autocast() -> None:
    job = supervised(criterion={"_target_": "torch.nn.MSELoss"}, metrics={})
    model = nn.Linear(4, 3)
    with torch.autocast("cpu", dtype=torch.float16):
        assert model(torch.zeros(2, 4)).dtype == torch.float16
        assert job.compute_loss(model, [torch.zeros(2, 4), torch.zeros(2, 3)]).loss.dtype == torch.float32


def test_class_weights_can_be_given_in_yaml() -> None:
    weight = {"_target_": "torch.tensor", "data": [1.0, 1.0, 1.0]}
    job = supervised(criterion={"_target_": "torch.nn.CrossEntropyLoss", "weight": weight})
    torch.testing.assert_close(loss_of(job).loss, loss_of(supervised()).loss)


def test_no_validation_dataset_means_no_validation() -> None:
    assert supervised().build_dataset("validation") is None


def test_the_model_is_built_under_the_seed_of_the_call() -> None:
    job = supervised()
    torch.manual_seed(5)
    first = job.build_model().state_dict()
    torch.manual_seed(5)
    assert first["weight"].equal(job.build_model().state_dict()["weight"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": "torch.nn.Linear"},
        {"model": {"_target_": "torch.nn.Linear"}},
        {"model": {"_target_": "builtins.dict"}},
        {"train_dataset": {"_target_": "builtins.object"}},
        {"criterion": {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}},
        {"criterion": {"_target_": "builtins.object"}},
        {"metrics": {"accuracy": "launcher.jobs.nowhere"}},
        {"metrics": {"accuracy": "nothing"}},
    ],
    ids=str,
)
def test_a_part_that_does_not_fit_is_a_job_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(JobError):
        loss_of(supervised(**arguments))


def test_num_correct_counts_samples() -> None:
    output = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]])
    assert int(num_correct(output, torch.tensor([1, 0, 0]))) == 2
    with pytest.raises(JobError):
        num_correct(output, output)


def test_a_supervised_job_can_be_sent_to_spawned_processes() -> None:
    assert_survives_pickling(supervised())

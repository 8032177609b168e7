"""The digits job: its texts, its images, its two towers."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from launcher.jobs.digits import DigitsJob, ImageTextModel, TextTower, encode_texts
from launcher.jobs.digits_data import DigitsDataset
from torch import nn

from launcher.errors import JobError
from tests.unit.job_claims import (
    assert_meta_initialisation_gives_the_same_weights,
    assert_sums_do_not_depend_on_the_split,
    assert_survives_pickling,
    samples_of,
)


@pytest.fixture(scope="module")
def digits() -> DigitsJob:
    return DigitsJob()


def test_every_prompt_encodes_distinctly(digits: DigitsJob) -> None:
    assert len({tuple(text) for text in digits.texts.tolist()}) == 10


def test_texts_are_bytes_padded_with_zeros() -> None:
    assert encode_texts(["ab", "é!!"]).tolist() == [[97, 98, 0, 0], [0xC3, 0xA9, 33, 33]]


def test_padding_does_not_change_a_text_embedding() -> None:
    tower = TextTower(width=8, embedding_size=4)
    alone, padded = encode_texts(["zero"]), encode_texts(["zero", "a longer text"])[:1]
    torch.testing.assert_close(tower(padded), tower(alone))


def test_the_text_tower_sees_the_order_of_bytes() -> None:
    tower = TextTower(width=8, embedding_size=4)
    abc, cab = tower(encode_texts(["abcabc", "cabbac"]))
    assert not torch.allclose(abc, cab)


def test_a_prompt_without_a_place_for_the_name_is_a_job_error() -> None:
    with pytest.raises(JobError, match="a photo"):
        DigitsJob(prompt="a photo")


def test_digit_splits_are_disjoint_whole_and_deterministic() -> None:
    train, validation = DigitsDataset("train"), DigitsDataset("validation")
    together = torch.cat([train.indices, validation.indices]).sort().values
    assert together.equal(torch.arange(1797))
    assert DigitsDataset("train").indices.equal(train.indices)
    assert not DigitsDataset("train", split_seed=1).indices.equal(train.indices)


def test_each_digit_gives_the_same_fraction_to_validation() -> None:
    train, validation = (torch.bincount(DigitsDataset(split, 0.2).label_ids) for split in ("train", "validation"))
    assert validation.tolist() == (0.2 * (train + validation)).round().tolist()


def test_digit_images_lie_between_zero_and_one() -> None:
    image, label_id = DigitsDataset("validation")[0]
    assert image.shape == (8, 8)
    assert 0 <= image.min() < image.max() <= 1
    assert label_id.dtype == torch.int64


@pytest.mark.parametrize("arguments", [{"split": "test"}, {"split": "train", "validation_fraction": 1.0}])
def test_a_digit_split_that_cannot_be_is_a_job_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(JobError):
        DigitsDataset(**arguments)


def test_missing_scikit_learn_is_a_job_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(JobError, match="scikit-learn"):
        DigitsDataset("train")


def test_digits_sums_do_not_depend_on_the_split_into_batches(digits: DigitsJob) -> None:
    assert_sums_do_not_depend_on_the_split(digits, samples_of(digits, 10))


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "FP16 parameters"])
def test_digits_logits_are_fp32_when_the_towers_run_in_fp16(digits: DigitsJob, autocast: bool) -> None:
    model = digits.build_model()
    batch = digits.collate(samples_of(digits, 4))
    if not autocast:
        model.half()
        batch["images"] = batch["images"].half()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        output = model(batch["images"], batch["texts"])
    assert output.dtype == torch.float32
    assert output.shape == (4, 10)
    assert output.isfinite().all()


def test_the_temperature_is_clamped(digits: DigitsJob) -> None:
    model = digits.build_model()
    nn.init.constant_(model.log_temperature, 50.0)
    batch = digits.collate(samples_of(digits, 4))
    assert model(batch["images"], batch["texts"]).abs().max() <= 100.001


def test_every_parameter_of_the_image_text_model_learns(digits: DigitsJob) -> None:
    model = digits.build_model()
    torch.autograd.backward(digits.compute_loss(model, digits.collate(samples_of(digits, 4))).loss)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_the_towers_are_what_is_sharded(digits: DigitsJob) -> None:
    model = digits.build_model()
    assert list(digits.blocks(model)) == [model.image_tower, model.text_tower]


def test_the_image_text_model_compares_any_number_of_texts(digits: DigitsJob) -> None:
    model: ImageTextModel = digits.build_model()
    assert model(torch.rand(3, 8, 8), encode_texts(["one", "two"])).shape == (3, 2)


def test_a_digits_model_from_the_meta_device_initialises_to_the_same_weights(digits: DigitsJob) -> None:
    assert_meta_initialisation_gives_the_same_weights(digits)


def test_a_digits_job_can_be_sent_to_spawned_processes(digits: DigitsJob) -> None:
    assert_survives_pickling(digits)

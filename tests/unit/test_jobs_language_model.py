"""The language model job: its text, its windows, its transformer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher.jobs.gpt import GPT
from launcher.jobs.language_model import LanguageModelJob
from launcher.jobs.text import IGNORED, ByteWindows, read_corpus
from torch import Tensor

from launcher.errors import JobError
from tests.unit.job_claims import (
    assert_meta_initialisation_gives_the_same_weights,
    assert_sums_do_not_depend_on_the_split,
    assert_survives_pickling,
    samples_of,
)

TINY_MODEL: dict[str, Any] = {"context": 16, "num_layers": 2, "num_heads": 2, "width": 16}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for number in range(20):
        path = folder / f"part-{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {number} says {'abc ' * number}")
    return folder


def text_job(corpus: Path, **arguments: Any) -> LanguageModelJob:
    return LanguageModelJob(
        **{"corpus": str(corpus), "pattern": "*.txt", "validation_fraction": 0.3, **TINY_MODEL, **arguments}
    )


def test_gpt_ties_its_head_to_the_embedding() -> None:
    model = GPT(vocabulary_size=11, context=4, num_layers=1, num_heads=1, width=8)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert shapes.count((11, 8)) == 1
    tokens = torch.tensor([[1, 2]])
    before = model(tokens)
    with torch.no_grad():
        model.token_embedding.weight[7] *= 2  # no input: only the head can show it
    after = model(tokens)
    torch.testing.assert_close(after[..., 7], 2 * before[..., 7])
    torch.testing.assert_close(after[..., :7], before[..., :7])


def test_gpt_does_not_see_the_future() -> None:
    model = GPT(vocabulary_size=11, context=8, num_layers=2, num_heads=2, width=8)
    tokens = torch.arange(8).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 5:] = 9
    torch.testing.assert_close(model(changed)[:, :5], model(tokens)[:, :5])


def test_gpt_loss_starts_near_the_logarithm_of_the_vocabulary(corpus: Path) -> None:
    torch.manual_seed(0)
    job = text_job(corpus)
    output = job.compute_loss(job.build_model(), job.collate(samples_of(job, 8)))
    assert float(output.loss.detach() / output.items) == pytest.approx(math.log(256), rel=0.02)
    assert float(output.metrics["bits_per_byte"] / output.items) == pytest.approx(8, rel=0.02)


def test_gpt_residual_projections_start_smaller() -> None:
    torch.manual_seed(0)
    model = GPT(vocabulary_size=64, context=8, num_layers=8, num_heads=2, width=64)
    block: Any = model.blocks[0]
    assert float(block.perceptron.input.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.perceptron.output.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)
    assert not block.perceptron.output.bias.any()


def test_padding_targets_are_not_counted(corpus: Path) -> None:
    job = text_job(corpus)
    model = job.build_model()
    tokens, targets = job.collate(samples_of(job, 2))
    whole = job.compute_loss(model, (tokens[:1], targets[:1]))
    targets[1] = IGNORED
    padded = job.compute_loss(model, (tokens, targets))
    assert isinstance(padded.items, Tensor)
    assert int(padded.items) == int(whole.items) == job.context
    torch.testing.assert_close(padded.loss, whole.loss)
    targets[:] = IGNORED
    nothing = job.compute_loss(model, (tokens, targets))
    assert float(nothing.loss.detach()) == int(nothing.items) == 0


def test_language_model_sums_do_not_depend_on_the_split_into_batches(corpus: Path) -> None:
    job = text_job(corpus)
    count = len(job.build_dataset("train") or [])
    assert_sums_do_not_depend_on_the_split(job, samples_of(job, count))


def test_windows_cover_every_byte_once() -> None:
    text = torch.arange(1, 12, dtype=torch.uint8)
    windows = ByteWindows(text, context=4)
    tokens, targets = zip(*(windows[index] for index in range(len(windows))), strict=True)
    assert torch.stack(tokens).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert torch.stack(targets).tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, IGNORED, IGNORED]]
    with pytest.raises(IndexError):
        windows[3]


def test_text_splits_are_disjoint_whole_and_deterministic(corpus: Path) -> None:
    first = read_corpus(corpus, "*.txt", None, 0.3)
    again = read_corpus(corpus, "*.txt", None, 0.3)
    assert all(first[split].equal(again[split]) for split in first)
    train, validation = (set(bytes(first[split].tolist()).split(b"\0")[:-1]) for split in ("train", "validation"))
    assert not train & validation
    assert train | validation == {path.read_bytes() for path in corpus.rglob("*.txt")}


def test_one_big_file_is_split_too(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("words " * 50_000)
    text = read_corpus(tmp_path, "*.txt", None, 0.1)
    assert 0 < len(text["validation"]) < len(text["train"])


def test_no_more_than_max_bytes_are_read(corpus: Path) -> None:
    text = read_corpus(corpus, "*.txt", 100, 0.0)
    assert len(bytes(text["train"].tolist()).replace(b"\0", b"")) == 100
    assert len(text["validation"]) == 0


def test_the_corpus_is_read_once(corpus: Path) -> None:
    job = text_job(corpus)
    job.build_dataset("train")
    for path in corpus.rglob("*.txt"):
        path.unlink()
    assert job.build_dataset("validation")


def test_the_default_corpus_is_the_standard_library() -> None:
    text = bytes(read_corpus(None, "this.py", None, 0.0)["train"].tolist())
    assert b"Gur Mra bs Clguba" in text


def test_no_validation_fraction_means_no_validation(corpus: Path) -> None:
    assert text_job(corpus, validation_fraction=0.0).build_dataset("validation") is None


def test_a_missing_empty_or_small_corpus_is_a_job_error_that_names_it(corpus: Path) -> None:
    nowhere = corpus / "nowhere"
    with pytest.raises(JobError, match="nowhere"):
        text_job(nowhere).build_dataset("train")
    nowhere.mkdir()
    with pytest.raises(JobError, match="nowhere"):
        text_job(nowhere).build_dataset("train")
    (nowhere / "short.txt").write_text("short")
    with pytest.raises(JobError, match=r"nowhere.*too small"):
        text_job(nowhere).build_dataset("train")


def test_only_matrices_decay() -> None:
    job = LanguageModelJob(**TINY_MODEL)
    model = job.build_model()
    decayed, plain = job.parameter_groups(model)
    assert "weight_decay" not in decayed
    assert plain["weight_decay"] == 0.0
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim < 2 for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("arguments", [{"vocabulary_size": 255}, {"width": 30, "num_heads": 4}])
def test_sizes_that_cannot_be_are_job_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(JobError):
        LanguageModelJob(**arguments).build_model()


def test_gpt_trains_in_fp16_with_an_fp32_loss(corpus: Path) -> None:
    job = text_job(corpus)
    model = job.build_model()
    with torch.autocast("cpu", dtype=torch.float16):
        output = job.compute_loss(model, job.collate(samples_of(job, 2)))
    assert output.loss.dtype == torch.float32
    torch.autograd.backward(output.loss * 65536 / 32)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_gpt_from_the_meta_device_initialises_to_the_same_weights() -> None:
    assert_meta_initialisation_gives_the_same_weights(LanguageModelJob(**TINY_MODEL))


def test_a_language_model_job_can_be_sent_to_spawned_processes(corpus: Path) -> None:
    assert_survives_pickling(text_job(corpus))

"""The example jobs keep the promises that a Job makes, and those of their own."""

from __future__ import annotations

import inspect
import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from launcher.jobs.digits import DigitsJob, ImageTextModel, TextTower, encode_texts
from launcher.jobs.digits_data import DigitsDataset
from launcher.jobs.gpt import GPT
from launcher.jobs.language_model import LanguageModelJob
from launcher.jobs.supervised import SupervisedJob, num_correct
from launcher.jobs.text import IGNORED, ByteWindows, read_corpus
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from launcher import Job, LossOutput
from launcher.errors import JobError

CONF = Path(__file__).parents[2] / "conf"
TINY_MODEL: dict[str, Any] = {"context": 16, "num_layers": 2, "num_heads": 2, "width": 16}


@pytest.fixture(scope="module")
def digits() -> DigitsJob:
    return DigitsJob()


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


def samples_of(job: Job, count: int) -> list[Any]:
    dataset: Any = job.build_dataset("train")
    return [dataset[index] for index in range(count)]


def assert_sums_do_not_depend_on_the_split(job: Job, samples: Sequence[Any]) -> None:
    torch.manual_seed(0)
    model = job.build_model().eval()
    cut = len(samples) // 3
    whole, *parts = (job.compute_loss(model, job.collate(some)) for some in (samples, samples[:cut], samples[cut:]))
    assert sum(int(part.items) for part in parts) == int(whole.items)
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), value)
    assert whole.loss.dtype == torch.float32
    assert whole.loss.requires_grad
    assert not any(value.requires_grad for value in whole.metrics.values())


# every job


@pytest.mark.parametrize("path", sorted((CONF / "job").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_job_config_lists_every_argument_with_its_default(path: Path) -> None:
    config: Any = OmegaConf.to_container(OmegaConf.load(path))
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    parameters = inspect.signature(get_class(config["_target_"])).parameters
    assert set(arguments) == set(parameters)
    for name, value in arguments.items():
        default = parameters[name].default
        if default is inspect.Parameter.empty:
            assert value == "???"
        elif name not in {"criterion", "metrics"}:  # None in Python, spelt out in YAML
            assert value == default


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_says_in_one_line_what_it_is(path: Path) -> None:
    package, description, *_ = path.read_text(encoding="utf-8").splitlines()
    assert package == "# @package _global_"
    assert description.startswith("# ")
    assert description.endswith(".")


# digits


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


# language model


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


@pytest.mark.parametrize("kind", ["gpt", "digits"])
def test_a_model_from_the_meta_device_initialises_to_the_same_weights(kind: str, digits: DigitsJob) -> None:
    job: Job = digits if kind == "digits" else LanguageModelJob(**TINY_MODEL)
    torch.manual_seed(3)
    built = job.build_model()
    with torch.device("meta"):
        model = job.build_model()
    model.to_empty(device="cpu")
    module: Any
    torch.manual_seed(3)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()
    for (name, parameter), expected in zip(model.named_parameters(), built.parameters(), strict=True):
        assert parameter.equal(expected), name


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


# supervised


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


def test_jobs_can_be_sent_to_spawned_processes(digits: DigitsJob, corpus: Path) -> None:
    for job in (digits, text_job(corpus), supervised()):
        copy = pickle.loads(pickle.dumps(job))
        assert len(copy.build_dataset("train")) == len(job.build_dataset("train"))  # type: ignore[arg-type]


def test_the_image_text_model_compares_any_number_of_texts(digits: DigitsJob) -> None:
    model: ImageTextModel = digits.build_model()
    assert model(torch.rand(3, 8, 8), encode_texts(["one", "two"])).shape == (3, 2)

"""Whatever is wrong with a command line is one ConfigurationError that says what to type instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.composing import refused


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_step=3", ["'train.max_step'", "Did you mean 'max_steps'?", "Valid: accumulation_steps,"]),
        ("precision.loss_scale.inital=1", ["Did you mean 'initial'?"]),
        ("optimizer.weight_deacy=1", ["Did you mean 'weight_decay'?", "+optimizer.weight_deacy="]),
        ("job.prmopt=x", ["Did you mean 'prompt'?"]),
        ("precision=fp61", ["precision=fp61", "Did you mean 'fp16'?", "bf16, fp16, fp32"]),
        ("optimizer=adamW", ["optimizer=adamW", "Did you mean 'adamw'?"]),
        ("schedule.decay=cosin", ["schedule.decay", "cosin", "constant", "linear", "cosine"]),
        ("train.max_steps=many", ["train.max_steps", "many"]),
        ("seed=null", ["seed"]),
        ("cluster.setup=hello", ["cluster.setup is a list: write cluster.setup=[first,second]"]),
        ("cluster.sbatch.comment=x", ["There is no key 'cluster.sbatch.comment'. To add a new key: +cluster.sbatch"]),
        ("digits", ["'digits' is not an override", "+experiment=NAME"]),
        ("seed=[1", ["seed=[1", "is not an override", "no viable alternative"]),
        ("run_dir=a=b", ["mismatched input '='", """goes in quotes: 'run_dir="a=b"'."""]),
        ("run_dir=/tmp/r ü", ["must not have", """goes in quotes: 'run_dir="/tmp/r ü"'."""]),
        ("name=${nothing}", ["nothing"]),
    ],
)
def test_a_wrong_override_says_what_is_right(override: str, words: list[str]) -> None:
    message = refused(["+experiment=digits", override])
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert "HYDRA_FULL_ERROR" not in message


def test_a_wrong_experiment_lists_those_there_are() -> None:
    message = refused(["+experiment=digit"])
    assert "experiment=digit does not exist" in message
    assert "Did you mean 'digits'?" in message
    assert "gpt_tiny" in message


def test_an_experiment_without_a_plus_is_told_what_to_type() -> None:
    message = refused(["experiment=digits"])
    assert "+experiment=digits" in message


def test_a_mandatory_value_that_is_missing_is_named() -> None:
    message = refused(["+job=supervised", "train.max_steps=1"])
    assert "job.model has no value" in message


def test_an_experiment_of_ones_own_that_is_no_yaml_is_named() -> None:
    path = Path("conf/experiment/mine.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\ntrain: [1\n")
    assert "mine.yaml" in refused(["+experiment=mine"])


def test_an_unknown_key_in_an_experiment_of_ones_own_is_named() -> None:
    path = Path("conf/experiment/mine.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\ntrain:\n  max_stepps: 3\n")
    message = refused(["+experiment=mine"])
    assert "train.max_stepps" in message
    assert "Did you mean 'max_steps'?" in message


def test_a_type_error_in_an_experiment_of_ones_own_is_named() -> None:
    path = Path("conf/experiment/mine.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\ntrain:\n  max_steps: often\n")
    message = refused(["+experiment=mine"])
    assert "train.max_steps" in message
    assert "often" in message


def test_a_config_dir_that_does_not_exist_is_named() -> None:
    assert "nowhere" in refused(["--config-dir", "nowhere", "+experiment=digits"])

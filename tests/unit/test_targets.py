"""What ``_target_`` names is imported and checked before anything starts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.config.targets import check_targets
from launcher.errors import ConfigurationError, JobError
from tests.unit.configs import good_config

JOB = """
from launcher import Job

class Whole(Job):
    def __init__(self, width, depth=2): ...
    def build_model(self): ...
    def build_dataset(self, split): ...
    def compute_loss(self, model, batch): ...

class Half(Job):
    def build_dataset(self, split): ...

class NotAJob: ...

def make(width): ...

def make_anything(**arguments): ...

number = 3
"""

Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Puts a module into a folder that can be imported from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def put(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    put("own_jobs", JOB)
    yield put
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def refused(kind: type[Exception] = ConfigurationError, **changes: Any) -> str:
    config = good_config()
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(kind) as caught:
        check_targets(config)
    return str(caught.value)


def job(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


def test_a_whole_job_passes(write: Write) -> None:
    config = good_config()
    for node in (job("own_jobs.Whole", width=1), job("own_jobs.make", width=1), job("own_jobs.make_anything", any=1)):
        config.job = node
        check_targets(config)


def test_a_module_that_does_not_exist_is_named(write: Write) -> None:
    message = refused(job=job("own_jbos.Whole"))
    assert "job._target_='own_jbos.Whole' cannot be imported" in message
    assert "No module named 'own_jbos'" in message


def test_a_class_that_does_not_exist_is_named(write: Write) -> None:
    assert "Hwole" in refused(job=job("own_jobs.Hwole"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n\ndef broken(:\n", ["SyntaxError", "bad_module.py, line 3"]),
        ("import nowhere_at_all\n", ["No module named 'nowhere_at_all'", "bad_module.py:1"]),
        ("from os import nothing_like_it\n", ["ImportError", "nothing_like_it", "bad_module.py:1"]),
        ("x = 1\ny = x / 0\n", ["ZeroDivisionError", "division by zero", "bad_module.py:2"]),
        ("import sys\nsys.exit(3)\n", ["sys.exit"]),
        ("raise ValueError\n", ["ValueError", "bad_module.py:1"]),
    ],
    ids=["SyntaxError", "missing module", "missing name", "ZeroDivisionError", "sys.exit", "no message"],
)
def test_a_module_that_fails_while_it_is_imported_says_why_and_where(write: Write, text: str, words: list[str]) -> None:
    write("bad_module", text)
    message = refused(job=job("bad_module.MyJob"))
    assert "job._target_='bad_module.MyJob' cannot be imported" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("target", [3, "", None])
def test_a_target_that_is_no_name_is_refused(target: Any) -> None:
    assert "is not a dotted name" in refused(job={"_target_": target})


def test_a_misspelled_argument_suggests_the_nearest(write: Write) -> None:
    message = refused(job=job("own_jobs.Whole", widht=1))
    assert "job.widht" in message
    assert "Did you mean 'width'?" in message
    assert "Valid: depth, width." in message


def test_a_missing_argument_is_named(write: Write) -> None:
    assert "needs the argument(s) width: set job.width" in refused(job=job("own_jobs.Whole", depth=1))


def test_the_methods_that_a_job_lacks_are_named_with_their_arguments(write: Write) -> None:
    message = refused(JobError, job=job("own_jobs.Half"))
    assert "build_model(self)" in message
    assert "compute_loss(self, model: 'nn.Module', batch: 'Any')" in message
    assert "build_dataset" not in message
    assert "class Half" in message


def test_a_class_that_is_no_job_is_told_to_become_one(write: Write) -> None:
    assert "write class NotAJob(Job)" in refused(JobError, job=job("own_jobs.NotAJob"))


def test_a_job_that_is_no_class_is_refused(write: Write) -> None:
    assert "is not a class" in refused(JobError, job=job("own_jobs.number"))


def test_nested_targets_are_checked_wherever_they_stand(write: Write) -> None:
    def nested(layer: dict[str, Any]) -> dict[str, Any]:
        return job("own_jobs.Whole", width={"_target_": "torch.nn.Sequential", "_args_": [layer]})

    key = "job.width._args_.0"
    assert f"{key}._target_='torch.nn.Liner'" in refused(job=nested({"_target_": "torch.nn.Liner"}))
    message = refused(job=nested({"_target_": "torch.nn.Linear", "in_feature": 3}))
    assert f"{key}.in_feature" in message
    assert "Did you mean 'in_features'?" in message


def test_a_nested_target_may_leave_arguments_to_its_job(write: Write) -> None:
    config = good_config()
    config.job = job("own_jobs.Whole", width={"_target_": "torch.nn.Linear", "in_features": 3})
    check_targets(config)


def test_an_optimizer_must_be_one() -> None:
    assert "is not a torch.optim.Optimizer" in refused(optimizer={"_target_": "torch.nn.Linear", "lr": 1.0})
    assert "cannot be called" in refused(optimizer={"_target_": "torch.pi", "lr": 1.0})
    assert "needs a closure" in refused(optimizer={"_target_": "torch.optim.LBFGS", "lr": 1.0})


def test_a_misspelled_optimizer_argument_suggests_the_nearest() -> None:
    message = refused(optimizer={"_target_": "torch.optim.AdamW", "lr": 1.0, "weight_deacy": 0.1})
    assert "Did you mean 'weight_decay'?" in message
    assert "params" not in message, "these come from the job, not from the configuration"


def test_an_optimizer_of_ones_own_may_need_more_than_parameters(write: Write) -> None:
    write("own_optimizer", "def build(params, lr, tau): ...\n")
    message = refused(optimizer={"_target_": "own_optimizer.build", "lr": 1.0})
    assert "needs the argument(s) tau" in message

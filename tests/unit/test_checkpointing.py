"""When a run is saved: by steps, by the clock of one rank, at the best validation, and at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import CheckpointStore, Manifest
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.snapshot import Snapshot
from launcher.config.schema import BestMode, CheckpointConfig, OnFailure
from launcher.errors import CheckpointWriteError, ConfigurationError
from launcher.observe import Reporter
from launcher.training.checkpointing import NoCheckpoints, RunCheckpoints
from launcher.training.outcome import StepNumbers


class Told(Reporter):
    def __init__(self) -> None:
        self.events: list[tuple[str, int, dict[str, Any]]] = []

    def event(self, event: str, step: int, **details: Any) -> None:
        self.events.append((event, step, details))


def numbers(step: int, **votes: int) -> StepNumbers:
    values = {
        "loss": 1.0,
        "grad_norm": 1.0,
        "loss_scale": 1.0,
        "overflow": False,
        "rate_factor": 1.0,
        "applied_steps": step,
        "stop": False,
        "digests": (1.0,),
        "origins": (),
        "wire_bytes": 0,
        "compression_error": None,
    }
    return StepNumbers(step=step, **{**values, **votes})  # type: ignore[arg-type]


def checkpoints(folder: Path, **settings: Any) -> RunCheckpoints:
    config = CheckpointConfig(**{"every_minutes": None, **settings})
    saver = Saver(CheckpointStore(folder / "checkpoints"), 0, 1, torch.device("cpu"), config.asynchronous)
    return RunCheckpoints(saver, config, Told(), rank=0)


def snapshot(step: int) -> Snapshot:
    counts = {"step": step, "applied_steps": step, "samples": step, "world_size": 1}
    manifest = Manifest(**counts, strategy="ddp", dtype="float32", config_digest="x")  # type: ignore[arg-type]
    return Snapshot({"model.weight": torch.ones(3)}, {}, manifest)


def save(found: RunCheckpoints, step: int) -> None:
    found.save(step, lambda best: snapshot(step))


def test_every_so_many_steps(tmp_path: Path) -> None:
    found = checkpoints(tmp_path, every_steps=3)
    assert [step for step in range(1, 10) if found.due(step, None, None)] == [3, 6, 9]


def test_the_clock_of_the_first_rank_asks_and_one_request_is_one_checkpoint(tmp_path: Path) -> None:
    found = checkpoints(tmp_path, every_minutes=1e-9)
    assert found.votes.save
    assert not found.due(4, numbers(3), None)
    assert found.due(4, numbers(3, save_votes=1), None)
    save(found, 4)
    assert not found.due(5, numbers(4, save_votes=1), None), "that was asked before"
    assert found.due(6, numbers(5, save_votes=1), None)
    found.rank = 1
    assert not found.votes.save
    assert not checkpoints(tmp_path, every_minutes=60).votes.save


@pytest.mark.parametrize(("mode", "best"), [(BestMode.min, [1, 3, 5]), (BestMode.max, [1, 2])])
def test_a_validation_that_is_the_best_so_far_is_saved(tmp_path: Path, mode: BestMode, best: list[int]) -> None:
    values = dict(enumerate([0.5, 0.9, 0.4, float("nan"), 0.1, 0.1], start=1))
    found = checkpoints(tmp_path, keep_best=1, best_mode=mode)
    for infinite in (float("inf"), float("-inf")):  # nothing would ever be better
        assert not found.due(0, None, {"loss": infinite})
    assert [step for step, value in values.items() if found.due(step, None, {"loss": value})] == best
    without = checkpoints(tmp_path, best_mode=mode)
    assert not any(without.due(step, None, {"loss": value}) for step, value in values.items())


@pytest.mark.parametrize(
    ("metric", "mode", "better", "worse"),
    [("loss", BestMode.min, 0.29, 0.31), ("accuracy", BestMode.max, 0.31, 0.29), ("loss", BestMode.max, 0.31, 0.29)],
)
def test_the_best_goes_on_where_it_is_judged_as_before_and_begins_anew_where_not(
    tmp_path: Path, metric: str, mode: BestMode, better: float, worse: float
) -> None:
    same = {"best_metric": metric, "best_mode": mode, "keep_best": 1}
    begun = checkpoints(tmp_path, **same)
    assert begun.due(1, None, {metric: 0.3})
    going_on = RunCheckpoints(begun.saver, begun.config, Told(), rank=0, best=begun.best)
    assert not going_on.due(2, None, {metric: worse})
    assert going_on.due(3, None, {metric: better})
    other_mode = BestMode.max if mode is BestMode.min else BestMode.min
    for other, value in (({"best_metric": "error"}, worse), ({"best_mode": other_mode}, better)):
        config = CheckpointConfig(**{**same, **other, "every_minutes": None})
        judged_anew = RunCheckpoints(begun.saver, config, Told(), rank=0, best=begun.best)
        assert judged_anew.due(2, None, {config.best_metric: value}), "by the old measure it is no better"
        assert not judged_anew.due(3, None, {config.best_metric: value})


def test_a_metric_that_is_not_there_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    validation = {"loss": 1.0, "accuracy": 0.5}
    found = checkpoints(tmp_path, keep_best=1, best_metric="acuracy")
    with pytest.raises(ConfigurationError) as caught:
        found.judge(7, validation, lambda best: snapshot(7))
    assert "best_metric=acuracy" in str(caught.value)
    assert "Did you mean 'accuracy'? There are: accuracy, loss. The run is at step 7" in str(caught.value)
    assert found.saver.store.newest_step() == 7


@pytest.mark.parametrize(
    "settings", [{"keep_best": 0, "best_metric": "x"}, {"keep_best": 1, "best_metric": "accuracy"}]
)
def test_a_metric_that_is_there_or_not_asked_for_is_no_matter(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = checkpoints(tmp_path, **settings)
    found.judge(7, {"loss": 1.0, "accuracy": 0.5}, lambda best: snapshot(7))
    assert found.saver.store.newest_step() is None


def test_training_goes_on_while_a_checkpoint_is_written_and_it_is_told_when_it_is_one(tmp_path: Path) -> None:
    found = checkpoints(tmp_path)
    save(found, 4)
    assert found.reporter.events == []
    step = 4
    while not found.reporter.events:
        step += 1
        found.observe(numbers(step, done_votes=int(found.votes.done)), step)
    ((event, of_step, details),) = found.reporter.events
    assert (event, of_step, details["path"]) == ("checkpoint", 4, "checkpoints/step-00000004")
    assert details["bytes"] > 0
    assert found.saver.store.newest_step() == 4


def test_votes_on_the_former_checkpoint_do_not_count_for_the_next(tmp_path: Path) -> None:
    found = checkpoints(tmp_path)
    save(found, 4)
    found.observe(numbers(3, done_votes=1), 4)
    found.observe(numbers(4, done_votes=1), 5)
    assert found.saver.busy
    found.finish(4, lambda best: snapshot(4), complete=True)
    assert not found.saver.busy
    assert [step for _, step, _ in found.reporter.events] == [4]


def test_the_end_is_saved_once(tmp_path: Path) -> None:
    found = checkpoints(tmp_path)
    save(found, 4)
    for _ in range(2):
        found.finish(5, lambda best: snapshot(5), complete=True)
    assert [(event, step) for event, step, _ in found.reporter.events] == [("checkpoint", 4), ("checkpoint", 5)]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_place_that_cannot_be_written_to_is_told_and_stops_the_run_only_if_asked(
    tmp_path: Path, asynchronous: bool
) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    found = checkpoints(tmp_path, asynchronous=asynchronous)
    found.finish(4, lambda best: snapshot(4), complete=False)
    ((event, step, details),) = found.reporter.events
    assert (event, step) == ("checkpoint_failed", 4)
    assert "File exists" in details["problems"][0]
    stopping = checkpoints(tmp_path, on_failure=OnFailure.stop, asynchronous=asynchronous)
    with pytest.raises(CheckpointWriteError, match="checkpoint of step 4 could not be written"):
        stopping.finish(4, lambda best: snapshot(4), complete=False)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_is_not_complete_before_its_last_state_is_on_the_disk(tmp_path: Path, asynchronous: bool) -> None:
    place = tmp_path / "checkpoints"
    place.write_text("a file where the folder should be")
    found = checkpoints(tmp_path, asynchronous=asynchronous)
    save(found, 4)
    with pytest.raises(CheckpointWriteError, match=r"step 4 could not be written[\s\S]*File exists[\s\S]*is not saved"):
        found.finish(4, lambda best: snapshot(4), complete=True)
    place.unlink()
    found.finish(4, lambda best: snapshot(4), complete=True)
    assert found.saver.store.newest_step() == 4


def test_without_checkpoints_nothing_is_due() -> None:
    none = NoCheckpoints()
    assert not none.due(100, numbers(99, save_votes=1), {"loss": 0.0})
    assert not none.votes.save

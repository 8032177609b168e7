"""Going on with a run: only the same one, alone, not somebody else's; what is written down, and what is not."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.checkpoint import CheckpointStore, Manifest
from launcher.clusters.attempts import begin_attempt, end_run, mark_stopping, refusal
from launcher.clusters.entering import Entry, enter
from launcher.clusters.safety import refuse_shared_run
from launcher.config.files import load_config
from launcher.config.schema import RunConfig
from launcher.errors import ConfigurationError, RunError
from launcher.rundir import RunDirectory, State, Status, append_json_line, read_json, write_json
from launcher.rundir.lock import RunLock
from tests.unit.configs import good_config


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """Entering makes the process's umask stricter."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def configured(tmp_path: Path, **changes: Any) -> RunConfig:
    return good_config(run_dir=str(tmp_path / "run"), **changes)


def entered(config: RunConfig, **options: Any) -> Entry:
    entry = enter(config, ["launch", "x"], **options)
    if entry.lock is not None:
        entry.lock.release()
    return entry


def begin(tmp_path: Path, *, finished_at: int | None = None) -> RunDirectory:
    """A run with one attempt behind it."""
    run = entered(configured(tmp_path)).run
    run.attempt_logs(0).mkdir(parents=True)
    end_run(run, 0, time.time(), State.finished if finished_at else State.resumable, None)
    if finished_at:
        write_json(run.result, {"step": finished_at})
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def attempts(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.attempts.read_text().splitlines()]


def test_the_same_configuration_goes_on_with_the_next_attempt(tmp_path: Path) -> None:
    run = begin(tmp_path)
    before = run.config.stat().st_mtime_ns
    entry = entered(configured(tmp_path))
    assert (entry.run, entry.attempt, entry.changes) == (run, 1, ())
    assert run.config.stat().st_mtime_ns == before
    assert run.configs() == [run.config]
    assert Status.read(run.status).attempt == 1
    assert [launch["attempt"] for launch in read_json(run.provenance)["resumed"]] == [1]


def test_changes_are_written_beside_the_first_configuration_for_this_attempt_and_later_ones(tmp_path: Path) -> None:
    run = begin(tmp_path)
    first = run.config.read_bytes()
    entry = entered(configured(tmp_path, train__max_steps=200, optimizer__lr=0.5, cluster__processes_per_node=4))
    keys = {change.key for change in entry.changes}
    assert keys == {"train.max_steps", "optimizer.lr", "cluster.processes_per_node"}
    assert run.config.read_bytes() == first
    assert run.config_of(0) == run.config
    assert run.config_of(1) == run.config_of(7) == run.path / "config-attempt-1.yaml"
    assert load_config(run.config_of(1)).train.max_steps == 200
    run.attempt_logs(1).mkdir(parents=True)
    assert entered(configured(tmp_path, train__max_steps=200, optimizer__lr=0.5)).changes[0].key.startswith("cluster")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"name": "else"}, "name: run there, else here"),
        ({"job__width": 3}, "job.width: null there, 3 here"),
        ({"optimizer___target_": "torch.optim.SGD"}, "optimizer._target_: torch.optim.AdamW there"),
    ],
)
def test_what_would_make_it_another_run_is_refused_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run = begin(tmp_path)
    before = contents(run.path)
    with pytest.raises(RunError, match="it would be another run") as caught:
        entered(configured(tmp_path, **change))
    assert named in str(caught.value)
    assert contents(run.path) == before


def test_a_jobs_arguments_may_change_where_they_were_named(tmp_path: Path) -> None:
    begin(tmp_path)
    assert entered(configured(tmp_path, job__width=3), job_may_change=True).changes[0].key == "job.width"
    with pytest.raises(RunError, match=r"job\._target_"):
        entered(configured(tmp_path, job___target_="other.Job"), job_may_change=True)


def test_batches_of_another_shape_and_the_same_size_are_the_same_run(tmp_path: Path) -> None:
    begin(tmp_path)
    change = {"train__global_batch_size": None, "train__accumulation_steps": 2, "cluster__processes_per_node": 4}
    assert entered(configured(tmp_path, **change)).attempt == 1


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    run = begin(tmp_path, finished_at=100)
    before = contents(run.path)
    assert entered(configured(tmp_path)).finished
    assert entered(configured(tmp_path, train__max_steps=50)).finished
    assert contents(run.path) == before


def test_a_finished_run_goes_on_if_it_is_to_be_longer(tmp_path: Path) -> None:
    run = begin(tmp_path, finished_at=100)
    assert not entered(configured(tmp_path, train__max_steps=101)).finished
    assert Status.read(run.status).state is State.running


def test_a_finished_run_does_not_answer_for_another_one(tmp_path: Path) -> None:
    begin(tmp_path, finished_at=100)
    with pytest.raises(RunError, match="it would be another run"):
        entered(configured(tmp_path, seed=1, train__max_steps=50))


@pytest.mark.parametrize("finished_at", [None, 100])
def test_an_attempt_that_was_refused_before_its_first_step_changes_nothing(
    tmp_path: Path, finished_at: int | None
) -> None:
    run = begin(tmp_path, finished_at=finished_at)
    before = Status.read(run.status)
    longer = {"train__max_steps": 200}
    for attempt in (1, 2):
        assert entered(configured(tmp_path, job__width=7, **longer), job_may_change=True).attempt == attempt
        end_run(run, attempt, time.time(), State.failed, "not of this model", refused=True)
        assert Status.read(run.status) == replace(before, updated=Status.read(run.status).updated)
        assert refusal(run) == "not of this model"
        assert run.result.exists() == (finished_at is not None)
        assert run.configs() == [run.config]
        assert entered(configured(tmp_path)).finished == (finished_at is not None)
        if finished_at is None:
            end_run(run, attempt + 1, time.time(), State.resumable, None)
            break
    assert {change.key for change in entered(configured(tmp_path, **longer)).changes} == {"train.max_steps"}


def test_a_refusal_after_the_first_step_leaves_the_run_failed_and_as_it_was_configured_then(tmp_path: Path) -> None:
    run = begin(tmp_path)
    entered(configured(tmp_path, job__width=7), job_may_change=True)
    append_json_line(run.metrics, {"kind": "train", "attempt": 1, "step": 1, "time": 1.0})
    end_run(run, 1, time.time(), State.failed, "no such sample", refused=True)
    status = Status.read(run.status)
    assert (status.state, status.attempt, status.reason) == (State.failed, 1, "no such sample")
    assert run.configs() == [run.config, run.config_from(1)]
    assert refusal(run) is None


def test_a_new_run_that_was_refused_has_failed(tmp_path: Path) -> None:
    run = entered(configured(tmp_path)).run
    end_run(run, 0, time.time(), State.failed, "no such model", refused=True)
    assert Status.read(run.status).state is State.failed
    assert run.config.exists()


def test_a_run_that_failed_before_its_first_step_may_become_any_other(tmp_path: Path) -> None:
    run = entered(configured(tmp_path)).run
    run.attempt_logs(0).mkdir(parents=True)
    end_run(run, 0, time.time(), State.failed, "no such model", refused=True)
    mended = {"seed": 1, "job__width": 3, "optimizer___target_": "torch.optim.SGD"}
    entry = entered(configured(tmp_path, **mended))
    assert entry.attempt == 1
    assert {change.key for change in entry.changes} >= {"seed", "job.width", "optimizer._target_"}
    assert load_config(run.config_of(1)).seed == 1
    append_json_line(run.metrics, {"kind": "train", "attempt": 1, "step": 1, "time": 1.0})
    end_run(run, 1, time.time(), State.failed, "boom")
    with pytest.raises(RunError, match="it would be another run"):
        entered(configured(tmp_path))


def test_an_attempt_whose_launcher_was_killed_is_written_down_by_the_next(tmp_path: Path) -> None:
    run = begin(tmp_path)
    entry = enter(configured(tmp_path), ["launch"])
    assert entry.lock is not None
    entry.lock.sign(1)
    run.attempt_logs(1).mkdir(parents=True)
    for step in (1, 2):
        append_json_line(run.metrics, {"kind": "train", "attempt": 1, "step": step, "time": 2e9 + step})
    with run.metrics.open("a") as file:
        file.write('{"kind": "train", "att')
    entry.lock.release()  # as the kernel does
    assert entered(configured(tmp_path)).attempt == 2
    _, lost = attempts(run)
    assert (lost["attempt"], lost["ended"], lost["first_step"], lost["last_step"]) == (1, "killed", 1, 2)
    assert lost["end"] == 2e9 + 2
    assert "ended without a word" in lost["reason"]
    assert run.metrics.read_text().endswith("}\n")


def test_a_run_without_any_lost_attempt_records_none(tmp_path: Path) -> None:
    run = begin(tmp_path)
    entry = entered(configured(tmp_path))
    end_run(run, entry.attempt, time.time(), State.resumable, None)
    entered(configured(tmp_path))
    assert [line["ended"] for line in attempts(run)] == ["resumable", "resumable"]


@pytest.mark.parametrize("place", [".", "config.yaml", "checkpoints", "checkpoints/step-00000010"])
@pytest.mark.parametrize(("mode", "word"), [(0o775, "group"), (0o757, "every user")])
def test_a_run_that_others_can_write_into_is_refused(tmp_path: Path, place: str, mode: int, word: str) -> None:
    run = begin(tmp_path)
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    assert entered(configured(tmp_path)).attempt == 1
    (run.path / place).chmod(mode)
    with pytest.raises(RunError, match="another user can write into it") as caught:
        entered(configured(tmp_path))
    assert str(run.path / place) in str(caught.value)
    assert word in str(caught.value)
    assert "checkpoint.trust_shared_directory=true" in str(caught.value)
    assert entered(configured(tmp_path, checkpoint__trust_shared_directory=True)).attempt == 2


def test_a_run_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path)
    if os.geteuid() == 0:
        os.chown(run.path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(RunError, match="belongs to another user"):
        refuse_shared_run(run, trusted=False)
    refuse_shared_run(run, trusted=True)


def test_a_link_to_a_folder_that_others_can_write_into_is_refused(tmp_path: Path) -> None:
    run = begin(tmp_path)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(0o777)
    run.checkpoints.symlink_to(tmp_path / "scratch")
    with pytest.raises(RunError, match=f"{tmp_path}/scratch can be written by every user"):
        refuse_shared_run(run, trusted=False)


def test_a_run_with_checkpoints_does_not_begin_again_without_looking_at_them(tmp_path: Path) -> None:
    run = begin(tmp_path)
    blind = configured(tmp_path, checkpoint__enabled=False)
    store = CheckpointStore(run.checkpoints)
    store.begin(10)
    assert not entered(blind).finished, "nothing has been committed"
    counts = {"step": 10, "applied_steps": 10, "samples": 0, "world_size": 1}
    store.commit(Manifest(**counts, strategy="ddp", dtype="float32", config_digest=""), {})  # type: ignore[arg-type]
    before = contents(run.path)
    with pytest.raises(RunError, match=r"checkpoint\.enabled=false: .* has a checkpoint of step 10"):
        entered(blind)
    assert contents(run.path) == before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "asleep"}', "\x00\x00"])
def test_a_damaged_status_or_result_is_named(tmp_path: Path, content: str) -> None:
    run = begin(tmp_path, finished_at=100)
    for path in (run.status, run.result):
        kept = path.read_text()
        path.write_text(content)
        with pytest.raises(RunError, match=rf"{path} is damaged: .* Move it away"):
            entered(configured(tmp_path))
        path.write_text(kept)
    run.result.unlink()
    run.status.unlink()
    assert entered(configured(tmp_path)).attempt == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"resumed": 3}'])
def test_a_damaged_record_of_where_a_run_comes_from_stops_nobody(tmp_path: Path, content: str) -> None:
    run = begin(tmp_path)
    run.provenance.write_text(content)
    assert entered(configured(tmp_path)).attempt == 1
    assert [launch["attempt"] for launch in read_json(run.provenance)["resumed"]] == [1]


@pytest.mark.parametrize("line", ['{"x": 1}', "[]", "3", '{"attempt": null}', "{"])
def test_damaged_lines_about_attempts_and_steps_stop_nobody(tmp_path: Path, line: str) -> None:
    run = begin(tmp_path)
    for path in (run.attempts, run.metrics):
        with path.open("a") as file:
            file.write(f"{line}\n")
    append_json_line(run.metrics, {"kind": "train", "attempt": 1})
    assert entered(configured(tmp_path)).attempt == 1
    end_run(run, 1, time.time(), State.failed, "no", refused=True)
    assert Status.read(run.status).state is State.resumable


@pytest.mark.parametrize("whole", [0.0, 0.3, 0.6, 0.95])
def test_a_configuration_that_was_cut_is_named(tmp_path: Path, whole: float) -> None:
    run = begin(tmp_path)
    text = run.config.read_text()
    run.config.write_text(text[: int(whole * len(text))])
    with pytest.raises(ConfigurationError, match=f"{run.config} is not a run's"):
        entered(configured(tmp_path))


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_message_and_the_run_can_be_entered_later(tmp_path: Path) -> None:
    for attempt in (0, 1):
        with full_disk(), pytest.raises(RunError, match=r"cannot be written to \(File too large"):
            entered(configured(tmp_path))
        entry = entered(configured(tmp_path))
        assert entry.attempt == attempt
        entry.run.attempt_logs(attempt).mkdir(parents=True)
        with full_disk(), pytest.raises(RunError, match=r"cannot be written to \(File too large"):
            begin_attempt(entry.run, attempt)
        begin_attempt(entry.run, attempt)
        with full_disk(), pytest.raises(RunError, match=r"cannot be written to \(File too large"):
            end_run(entry.run, attempt, time.time(), State.resumable, None)
        with full_disk():
            mark_stopping(entry.run)
        end_run(entry.run, attempt, time.time(), State.resumable, None)


def test_a_run_that_another_launch_submits_while_this_one_waits_for_the_lock_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '9|PENDING|Priority|N/A|'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run, take = begin(tmp_path), RunLock.take

    def take_late(run: RunDirectory) -> RunLock:
        Status.read(run.status).now(State.submitted, job_id="9").write(run.status)
        return take(run)

    monkeypatch.setattr(RunLock, "take", take_late)
    with pytest.raises(RunError, match=r"is SLURM's job 9 PENDING"):
        entered(configured(tmp_path))
    assert Status.read(run.status).state is State.submitted
    take(run).release()


def test_weights_to_begin_with_must_exist_until_there_is_a_checkpoint(tmp_path: Path) -> None:
    config = configured(tmp_path, train__init_from=str(tmp_path / "weights.safetensors"))
    with pytest.raises(RunError, match=r"train.init_from=.*there is no such file"):
        entered(config)
    (tmp_path / "weights.safetensors").mkdir()
    with pytest.raises(RunError, match=r"train.init_from=.*that is no file"):
        entered(config)
    (tmp_path / "weights.safetensors").rmdir()
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(RunError, match=r"cannot be read as a .safetensors file: .*What torch.save has written"):
        entered(config)
    assert not (tmp_path / "run").exists()
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    entered(config)
    (tmp_path / "weights.safetensors").unlink()
    os.mkfifo(tmp_path / "weights.safetensors")
    with pytest.raises(RunError, match=r"train.init_from=.*that is no file"):  # to open it would wait for ever
        entered(config)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert entered(config).attempt == 1

"""A run on disk: names, permissions, whole files."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.attempts import end_run, reported_steps
from launcher.clusters.entering import enter
from launcher.config.files import load_config
from launcher.errors import ConfigurationError
from launcher.rundir import RunDirectory, State, Status, append_json_line, layout, read_json, records, write_json
from tests.unit.configs import good_config


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_run_is_named_by_its_second_and_four_hexadecimal_digits(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs", "mine")
    assert run.path.parent == tmp_path / "runs" / "mine"
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run.id)
    assert run.path.is_dir()


def test_every_file_name_is_the_documented_one() -> None:
    run = RunDirectory(Path("/r"))
    names = [run.config, run.provenance, run.status, run.attempts, run.metrics, run.result]
    assert [path.name for path in names] == [
        "config.yaml",
        "provenance.json",
        "status.json",
        "attempts.jsonl",
        "metrics.jsonl",
        "result.json",
    ]
    assert run.rank_log(0, 3) == Path("/r/logs/attempt-0/rank-3.log")
    assert run.rank_failure(1, 3).parent == run.agent_log(1, 0).parent == run.attempt_logs(1)


def test_runs_made_in_the_same_second_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Few suffixes, so that nearly every call meets a name that is taken.
    suffixes = [f"{number:04x}" for number in range(32)]
    monkeypatch.setattr(layout.secrets, "token_hex", lambda size: suffixes[int.from_bytes(os.urandom(1), "big") % 32])

    class Now:
        @staticmethod
        def now() -> Any:
            return Now()

        def strftime(self, form: str) -> str:
            return "20260101-000000"

    monkeypatch.setattr(layout, "datetime", Now)
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: RunDirectory.create(tmp_path, "run").path, range(32)))
    assert len(set(runs)) == 32


@pytest.mark.usefixtures("_open_umask")
def test_others_may_never_write_into_a_run(tmp_path: Path) -> None:
    config = good_config(runs_root=str(tmp_path / "runs"))
    made = [enter(config, ["launch"]).run.path, RunDirectory.create(tmp_path, "x", str(tmp_path / "own")).path]
    for path in [*made, *(file for folder in made for file in folder.iterdir())]:
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path


def test_a_chosen_directory_may_exist_if_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert RunDirectory.create(tmp_path, "x", str(tmp_path / "empty")).path == tmp_path / "empty"
    assert RunDirectory.create(tmp_path, "x", str(tmp_path / "a/b")).path == tmp_path / "a/b"


def test_a_chosen_directory_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"run_dir=.*is not empty"):
        RunDirectory.create(tmp_path, "x", str(tmp_path))


@pytest.mark.parametrize("arguments", [{"runs_root": "file"}, {"run_dir": "file"}, {"run_dir": "file/below"}])
def test_a_place_where_no_directory_can_be_made_is_refused(tmp_path: Path, arguments: dict[str, str]) -> None:
    (tmp_path / "file").touch()
    places: dict[str, Any] = {key: str(tmp_path / place) for key, place in arguments.items()}
    with pytest.raises(ConfigurationError, match="no run directory can be made there"):
        RunDirectory.create(Path(places.get("runs_root", tmp_path)), "x", places.get("run_dir"))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": True})

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(records.os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": True})
    assert read_json(path) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_synced_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(records.os, name, lambda *args, n=name, f=real: (order.append(n), f(*args))[1])
    write_json(tmp_path / "value.json", 1)
    assert order == ["fsync", "replace"]


def test_lines_of_several_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: append_json_line(path, {"number": number, "fill": "x" * 500}), range(100)))
    assert sorted(json.loads(line)["number"] for line in path.read_text().splitlines()) == list(range(100))


def test_a_status_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    status = Status(State.running, attempt=2, step=7, hosts=("a", "b"), job_id="12", reason="why")
    status.write(path)
    assert Status.read(path) == status
    assert read_json(path)["state"] == "running"
    later = status.now(State.failed, step=8)
    assert (later.state, later.step, later.hosts) == (State.failed, 8, ("a", "b"))
    assert later.updated >= status.updated


def test_a_new_run_holds_all_that_is_known_before_it_starts(tmp_path: Path) -> None:
    config = good_config(runs_root=str(tmp_path))
    run = enter(config, ["launch", "name=a b"]).run
    assert load_config(run.config) == config
    assert Status.read(run.status).state is State.running
    made = read_json(run.provenance)
    assert made["command"] == "launch 'name=a b'"
    assert made["versions"]["torch"]


def test_the_end_of_an_attempt_is_written_down(tmp_path: Path) -> None:
    run = enter(good_config(runs_root=str(tmp_path)), ["launch"]).run
    for attempt, step in [(0, 1), (0, 2), (1, 2), (1, 3), (1, 4)]:
        append_json_line(run.metrics, {"kind": "train", "attempt": attempt, "step": step})
    append_json_line(run.metrics, {"kind": "validation", "attempt": 1, "step": 9})
    with run.metrics.open("a") as file:
        file.write('{"kind": "train", "att')  # a crash has cut it
    assert reported_steps(run, 0) == range(1, 3)
    assert reported_steps(run, 1) == range(2, 5)
    assert not reported_steps(run, 2)
    end_run(run, 1, 5.0, State.failed, "broken")
    status = Status.read(run.status)
    assert (status.state, status.attempt, status.step, status.reason) == (State.failed, 1, 4, "broken")
    (line,) = [json.loads(text) for text in run.attempts.read_text().splitlines()]
    assert (line["attempt"], line["start"], line["first_step"], line["last_step"]) == (1, 5.0, 2, 4)
    assert (line["ended"], line["reason"]) == ("failed", "broken")
    assert line["end"] >= line["start"]

"""One launch at a time writes a run; a run that another user could have written into is not loaded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.e2e.session import LAUNCH, Command

Start = Callable[..., Command]
LONG = ["+experiment=own", "run_dir=mine", "train.max_steps=10000", "job.sleep=0.02"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_launch_of_a_run_is_refused_and_the_first_goes_on(start: Start, project: Path) -> None:
    first = start(LONG, project)
    first.until(lambda: (project / "mine" / "metrics.jsonl").exists())
    for arguments in (LONG, ["resume", "mine"]):
        second = start(arguments, project)
        assert second.wait() == 2
        assert f"is being written by process {first.pid} on" in second.errors
    lines = (project / "mine" / "metrics.jsonl").read_text().count("\n")
    first.until(lambda: (project / "mine" / "metrics.jsonl").read_text().count("\n") > lines + 3)
    first.send(signal.SIGTERM)
    assert first.wait() == 75
    attempts = (project / "mine" / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["ended"] for line in attempts] == ["resumable"]


def test_of_two_launches_at_the_same_moment_one_makes_the_run(start: Start, project: Path) -> None:
    commands = [start(["+experiment=own", "run_dir=mine", "job.sleep=0.1"], project) for _ in range(2)]
    assert sorted(command.wait() for command in commands) in ([0, 2], [0, 0])  # the slower one may find it finished
    attempts = (project / "mine" / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["ended"] for line in attempts] == ["finished"]
    if any("written by" in command.errors for command in commands):
        return
    assert any("has finished" in command.output for command in commands)


def test_a_run_that_others_can_write_into_is_not_loaded(start: Start, project: Path) -> None:
    begun = start(["+experiment=own", "run_dir=mine"], project)
    assert begun.wait() == 0, begun.errors
    (project / "mine").chmod(0o777)
    before = contents(project / "mine")
    for arguments in (["+experiment=own", "run_dir=mine"], ["resume", "mine", "train.max_steps=12"]):
        command = start(arguments, project)
        assert command.wait() == 2
        assert "another user can write into it" in command.errors
        assert "can be written by every user (mode 777)" in command.errors
        assert "Traceback" not in command.errors
    assert contents(project / "mine") == before
    trusting = ["resume", "mine", "train.max_steps=12", "checkpoint.trust_shared_directory=true"]
    command = start(trusting, project)
    assert command.wait() == 0, command.errors


def test_nobody_else_can_write_into_a_run_whatever_the_umask(start: Start, project: Path) -> None:
    command = start(
        ["+experiment=own", "runs_root=all/runs"], project, ("sh", "-c", 'umask 0; exec "$@"', "sh", *LAUNCH)
    )
    assert command.wait() == 0, command.errors
    made = [project / "all", *(project / "all").rglob("*")]
    assert any(path.name == "rank-1.log" for path in made)
    writable = {str(path): oct(path.stat().st_mode) for path in made if path.stat().st_mode & 0o022}
    assert not writable


def test_an_existing_empty_folder_is_closed_to_others(start: Start, project: Path) -> None:
    (project / "mine").mkdir()
    os.chmod(project / "mine", 0o777)
    command = start(["+experiment=own", "run_dir=mine"], project)
    assert command.wait() == 0, command.errors
    assert (project / "mine").stat().st_mode & 0o777 == 0o755

"""``launch resume RUN``: which run, from which folder, with which changes. Exactness is in test_resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.session import LAUNCH, Command
from tests.e2e.test_runs import TORCHRUN, json_lines

Start = Callable[..., Command]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume", "nothing"], "there are no runs below runs"),
        (["resume"], "Which run? launch resume RUN"),
        (["resume", "train.max_steps=3"], "Which run? launch resume RUN"),
        (["resume", "-m", "x"], "Which run? launch resume RUN"),
        (["resume", "x", "-m"], "A sweep (-m) makes new runs"),
        (["resume", "x", "run_dir=y"], "run_dir cannot be changed"),
        (["resum"], "'resum' is not a verb. Did you mean 'resume'?"),
        (["own"], "'own' is not a verb. An experiment is chosen by launch +experiment=own"),
    ],
)
def test_a_wrong_verb_or_run_gets_one_message_and_needs_no_torch(
    project: Path, arguments: list[str], message: str
) -> None:
    code = (
        "import sys\nfrom launcher.cli import main\n"
        f"code = main({arguments!r})\n"
        "sys.exit(99 if {'torch', 'hydra'} & set(sys.modules) else code)"
    )
    command = [sys.executable, "-c", code]
    completed = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert completed.returncode == 2, completed.stderr
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr


def test_help_names_the_verbs(start: Start, project: Path) -> None:
    command = start(["--help"], project)
    assert command.wait() == 0
    assert "launch resume RUN" in command.output
    assert "launch export RUN" in command.output


def test_a_finished_run_says_so_and_nothing_is_written(start: Start, project: Path) -> None:
    same = ["+experiment=own", "run_dir=mine"]
    command = start(same, project)
    assert command.wait() == 0, command.errors
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (project / "mine").rglob("*")}
    for arguments in (same, ["resume", "mine"]):
        command = start(arguments, project)
        assert command.wait() == 0, command.errors
        assert "the run mine has finished" in command.output
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (project / "mine").rglob("*")}


def test_a_resume_that_a_worker_refuses_changes_nothing(start: Start, project: Path) -> None:
    same = ["+experiment=own", "run_dir=mine"]
    command = start(same, project)
    assert command.wait() == 0, command.errors
    run = project / "mine"
    result, state = (run / "result.json").read_bytes(), json.loads((run / "status.json").read_text())
    restarting = (*TORCHRUN[:3], "--max-restarts", "1", *TORCHRUN[3:])
    for attempt, (kind, code) in enumerate(((LAUNCH, 2), (restarting, 1)), start=1):
        command = start(["resume", "mine", "job.fail=dataset", "train.max_steps=30"], project, kind)
        assert command.wait() == code, "torchrun's own exit code is 1"
        said = [line for line in command.errors.splitlines() if line.startswith("launch: ")]
        assert "build_dataset" in said[0]
        assert len(said) == 1 or kind == restarting, "of torchrun's ranks two may think they were first"
        assert "failed; its log" not in command.errors
        assert "to go on" not in command.output
        assert (run / "result.json").read_bytes() == result
        assert {**json.loads((run / "status.json").read_text()), "updated": state["updated"]} == state
        assert not list(run.glob("config-attempt-*"))
        assert len(json_lines(run / "attempts.jsonl")) == attempt + 1
    command = start(same, project)
    assert command.wait() == 0, command.errors
    assert "the run mine has finished" in command.output


def test_another_configuration_for_the_same_run_is_one_message(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "run_dir=mine", "job.fail=raise"], project)
    assert command.wait() == 1
    command = start(["+experiment=own", "run_dir=mine", "seed=7"], project)
    assert command.wait() == 2
    assert "seed: 0 there, 7 here" in command.errors
    assert "job.fail: raise there, nothing here" in command.errors
    assert "Traceback" not in command.errors


def test_a_run_goes_on_from_another_folder_with_changes(start: Start, project: Path, tmp_path: Path) -> None:
    """The job's module is only where the run was begun; the groups chosen anew replace the run's own."""
    command = start(["+experiment=own", "job.fail=raise"], project)
    assert command.wait() == 1
    run = command.run_directory()
    first = (run / "config.yaml").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    changes = ["job.fail=nothing", "parallel=fsdp", "train.max_steps=12", "cluster.processes_per_node=1"]
    command = start(["resume", str(run), *changes], elsewhere)
    assert command.wait() == 0, command.errors
    assert f"in {project}, where the run was begun" in command.output
    assert "changed: parallel.strategy: ddp → fsdp" in command.output
    assert list(elsewhere.iterdir()) == []
    assert (run / "config.yaml").read_bytes() == first
    assert "strategy: fsdp" in (run / "config-attempt-1.yaml").read_text()
    assert [line["ended"] for line in json_lines(run / "attempts.jsonl")] == ["failed", "finished"]
    assert {path.name for path in (run / "logs" / "attempt-1").glob("rank-*")} == {"rank-0.log"}
    assert json_lines(run / "metrics.jsonl")[-1]["attempt"] == 1
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["folder"] == str(project)
    assert provenance["resumed"][0]["command"].startswith("launch resume")


def test_from_another_folder_it_says_how_to_go_on_from_there(start: Start, project: Path, tmp_path: Path) -> None:
    command = start(["+experiment=own", "run_dir=mine", "job.fail=raise", "checkpoint.every_steps=1"], project)
    assert command.wait() == 1
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder, written in ((elsewhere, "'../a project/mine'"), (project / "conf", "../mine")):
        command = start(["resume", str(project / "mine")], folder)
        assert command.wait() == 1
        assert f"launch resume {written}" in command.output


def test_a_wrong_override_is_one_message(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "job.fail=raise"], project)
    assert command.wait() == 1
    for override, message in (
        ("parallel=fsdpp", "Did you mean 'fsdp'?"),
        ("train.max_step=3", "Did you mean 'max_steps'?"),
        ("seed=3", "seed: 0 there, 3 here"),
    ):
        command = start(["resume", "latest", override], project)
        assert command.wait() == 2
        assert message in command.errors
        assert "Traceback" not in command.errors


def test_cfg_shows_what_a_resume_would_run(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "job.fail=raise", "optimizer=sgd"], project)
    assert command.wait() == 1
    command = start(["resume", "latest", "precision=bf16", "--cfg", "job"], project)
    assert command.wait() == 0, command.errors
    assert "dtype: bfloat16" in command.output
    assert "torch.optim.SGD" in command.output
    assert "betas" not in command.output


def test_torchrun_goes_on_with_a_run_of_launch_and_the_other_way_round(start: Start, project: Path) -> None:
    long = ["train.max_steps=10000", "job.sleep=0.02"]
    command = start(["+experiment=own", *long], project)
    command.until(lambda: command.steps() > 2)
    command.send(signal.SIGTERM)
    assert command.wait() == 75
    run = command.run_directory()
    resumed = start(["resume", "latest", "job.sleep=0.0", "train.max_steps=300"], project, TORCHRUN)
    assert resumed.wait() == 0, resumed.errors
    command = start(["resume", "latest", "train.max_steps=310"], project)
    assert command.wait() == 0, command.errors
    ended = [(line["attempt"], line["ended"]) for line in json_lines(run / "attempts.jsonl")]
    assert ended == [(0, "resumable"), (1, "finished"), (2, "finished")]


def test_what_torchrun_restarts_goes_on_in_the_same_run(start: Start, project: Path) -> None:
    torchrun = (*TORCHRUN[:3], "--max-restarts", "1", *TORCHRUN[3:])
    saving = ["checkpoint.every_steps=1", "checkpoint.asynchronous=false"]
    command = start(["+experiment=own", "job.fail=raise once", *saving], project, torchrun)
    assert command.wait() == 0, command.errors
    run = command.run_directory()
    assert [(line["attempt"], line["ended"]) for line in json_lines(run / "attempts.jsonl")] == [
        (0, "failed"),
        (1, "finished"),
    ]
    (resume,) = [line for line in json_lines(run / "metrics.jsonl") if line.get("event") == "resume"]
    assert (resume["attempt"], resume["step"]) == (1, 2)

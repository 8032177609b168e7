"""The command itself: what it shows, what it finds, what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher
from tests.e2e.session import Command

Start = Callable[..., Command]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["+experiment=digits", "--cfg", "job"]])
def test_looking_needs_no_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom launcher.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    completed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert completed.returncode == 0, completed.stderr.decode()


def test_help_lists_experiments_and_groups(start: Start, project: Path) -> None:
    command = start(["--help"], project)
    assert command.wait() == 0
    assert "experiment: digits, gpt2_124m, gpt_tiny, mlp_digits, own" in command.output
    assert "parallel: ddp, fsdp, hsdp, zero2" in command.output
    assert "--config-dir" in command.output


def test_version(start: Start, tmp_path: Path) -> None:
    command = start(["--version"], tmp_path)
    assert command.wait() == 0
    assert command.output == f"launch {launcher.__version__}\n"


def test_without_an_experiment_it_says_what_to_type(start: Start, project: Path) -> None:
    command = start([], project)
    assert command.wait() == 2
    assert "launch +experiment=NAME" in command.errors
    assert "digits" in command.errors
    assert "A straight line, for tests." in command.errors


def test_cfg_prints_the_composed_configuration(start: Start, project: Path) -> None:
    command = start(["+experiment=own", "train.max_steps=77", "--cfg", "job"], project)
    assert command.wait() == 0
    assert "max_steps: 77" in command.output
    assert not (project / "runs").exists()


def test_a_projects_own_files_come_before_the_shipped_ones(start: Start, project: Path) -> None:
    experiment = project / "conf" / "experiment"
    (experiment / "digits.yaml").write_text((experiment / "own.yaml").read_text())
    (project / "conf" / "config.yaml").write_text("another: program\n")
    command = start(["+experiment=digits", "--cfg", "job"], project)
    assert command.wait() == 0, command.errors
    assert "_target_: own_job.Own" in command.output


def test_config_dir_adds_a_folder(start: Start, project: Path, tmp_path: Path) -> None:
    (project / "conf").rename(tmp_path / "elsewhere")
    command = start(["+experiment=own", "--config-dir", str(tmp_path / "elsewhere"), "--cfg", "job"], project)
    assert command.wait() == 0, command.errors
    assert "_target_: own_job.Own" in command.output


def test_completion_knows_a_projects_experiments(project: Path) -> None:
    line = "launch +experiment=o"
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    completed = subprocess.run(
        [sys.executable, "-m", "launcher", "-sc", "query=bash"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stdout.split() == ["+experiment=own"]

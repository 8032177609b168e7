"""A stop while SLURM's controller is silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.clusters.slurm.leading import patiently_shown


def _scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, silent_times: int) -> Path:
    asked = folder / "asked"
    program = folder / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho >> "{asked}"\n'
        f'[ "$(wc -l < "{asked}")" -gt {silent_times} ] && {{ echo "JobId=7 JobState=RUNNING"; exit 0; }}\n'
        "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return asked


def test_a_controller_that_is_silent_once_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _scontrol(tmp_path, monkeypatch, silent_times=1)
    job = patiently_shown("7", patience=20)
    assert job is not None
    assert job["JobState"] == "RUNNING"
    assert asked.read_text().count("\n") == 2


def test_a_controller_that_never_answers_is_no_ended_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _scontrol(tmp_path, monkeypatch, silent_times=1000)
    assert patiently_shown("7", patience=0) is None

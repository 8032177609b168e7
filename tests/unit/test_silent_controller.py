"""A stop while SLURM's controller is silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.clusters.slurm import queue


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
    assert queue.show("7", patience_seconds=20)["JobState"] == "RUNNING"
    assert asked.read_text().count("\n") == 2


def test_a_controller_that_never_answers_is_told_from_one_that_knows_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scontrol(tmp_path, monkeypatch, silent_times=1000)
    with pytest.raises(queue.QueueError, match="Socket timed out"):
        queue.show("7", patience_seconds=0)

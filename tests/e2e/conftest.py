"""A user's project, and commands that leave nothing behind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.session import LAUNCH, Command, survivors

HERE = Path(__file__).parent
SETTLE_SECONDS = 8.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a job and an experiment of its own; nothing in it is installed."""
    return make_project(tmp_path / "a project")


def make_project(folder: Path) -> Path:
    (folder / "conf" / "experiment").mkdir(parents=True)
    shutil.copy(HERE / "own_job.py", folder)
    shutil.copy(HERE / "own.yaml", folder / "conf" / "experiment")
    return folder


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Starts commands, and fails the test if a process of theirs is still there at the end."""
    commands: list[Command] = []

    def start(arguments: Sequence[str], folder: Path, command: Sequence[str] = LAUNCH) -> Command:
        commands.append(Command(arguments, folder, command))
        return commands[-1]

    yield start
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(survivors(command.pid) for command in commands) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = {command.pid: survivors(command.pid) for command in commands}
    for command in commands:
        command.end()
    assert not any(left.values()), f"processes left behind: {left}"

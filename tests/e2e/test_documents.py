"""What the documents say is so: links lead somewhere, commands compose, the example job trains."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.session import Command

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted(REPOSITORY.glob("*.md"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)


def launch_lines() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if re.match(r"(launch|torchrun .* launcher) .*experiment=", line)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("line", launch_lines())
def test_the_readmes_commands_compose(line: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(line) if word not in ("-m", "--cfg", "job")]
    overrides = [word.split(",")[0] for word in words if "=" in word]
    command = [sys.executable, "-m", "launcher", *overrides, "--cfg", "job"]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr


def test_there_are_commands_to_check() -> None:
    assert len(launch_lines()) >= 5


def test_the_readmes_own_job_trains(start: Callable[..., Command], tmp_path: Path) -> None:
    source, _ = blocks("python")
    (experiment,) = blocks("yaml")
    (tmp_path / "own_job.py").write_text(source)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text(experiment)
    command = start(["+experiment=own"], tmp_path)
    assert command.wait() == 0, command.errors
    assert "finished: step 79" in command.output


def test_the_readmes_own_loop_trains_with_compressed_gradients(tmp_path: Path) -> None:
    _, source = blocks("python")
    (tmp_path / "loop.py").write_text(source)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "loop.py"]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert completed.returncode == 0, completed.stderr
    found = re.findall(r"rank \d: loss ([\d.]+), (\d+) bytes", completed.stdout)
    assert len(found) == 2
    values = 64 * 256 + 256 + 256 + 1
    for loss, sent in found:
        assert float(loss) < 0.2
        assert values < int(sent) / 20 < values * 1.05, "a byte a value, and the scales"

"""The example clusters compose, and say what their comments say. Needs no SLURM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = sorted((Path(__file__).parents[2] / "slurm" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_composes_in_a_users_project(example: Path, tmp_path: Path) -> None:
    groups = tmp_path / "conf" / "cluster"
    groups.mkdir(parents=True)
    (groups / example.name).write_text(example.read_text())
    command = [sys.executable, "-m", "launcher", "+experiment=digits", f"cluster={example.stem}", "--cfg", "job"]
    composed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert composed.returncode == 0, composed.stderr
    cluster = yaml.safe_load(composed.stdout)["cluster"]
    assert cluster["kind"] == "slurm"
    asked = yaml.safe_load(example.read_text())
    del asked["defaults"]
    assert {name: cluster[name] for name in asked} == asked

"""The first node of a job of SLURM: what it cannot write down is one message, not a traceback."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from launcher.clusters.agent import StopForwarder
from launcher.clusters.slurm.leading import lead
from launcher.config.files import to_yaml
from launcher.environment import JobPlace
from launcher.errors import EXIT_FAILED
from launcher.rundir import RunDirectory, State, Status
from tests.unit.configs import good_config
from tests.unit.test_entering import full_disk


@pytest.mark.parametrize("case", ["from the beginning", "once the nodes have met"])
def test_a_full_disk_ends_the_job_with_one_message(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = good_config(cluster__kind="slurm", cluster__processes_per_node=1)
    run = RunDirectory(tmp_path / "run")
    submission = tmp_path / "run" / "submission" / "0"
    submission.mkdir(parents=True)
    run.config.write_text(to_yaml(config))
    Status(State.submitted, job_id="1").write(run.status)
    place = JobPlace("1", node=0, num_nodes=1, node_list="here", turn=0)
    early = case == "from the beginning"
    if not early:
        run.fence.mkdir()  # what is written there next fails
    began = time.monotonic()
    with full_disk() if early else nullcontext():
        code = lead(run, config, place, submission, StopForwarder())
    assert code == EXIT_FAILED
    assert time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert said.startswith("launch: ")
    assert "cannot be written to (" in said
    assert said.count("\n") == 1
    if not early:
        status = Status.read(run.status)
        assert (status.state, said) == (State.failed, f"launch: {status.reason}\n")

"""What is refused before anything is sent to SLURM, and what sbatch is given."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.slurm import batch
from launcher.config.prepare import prepare
from launcher.config.rules import check
from launcher.config.schema import Device, RunConfig
from launcher.environment import JobPlace, outside_of_jobs, thread_limit
from launcher.errors import ConfigurationError, RequestError
from tests.unit.configs import good_config


def slurm_config(**changes: Any) -> RunConfig:
    return good_config(**{"cluster__kind": "slurm", "cluster__nodes": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cluster__time_limit_min": 0}, ["cluster.time_limit_min=0", "at least 1"]),
        ({"cluster__time_limit_min": 2}, ["signal_lead_seconds=120", "not below", "such as 30"]),
        ({"cluster__signal_lead_seconds": 70000, "cluster__time_limit_min": 9000}, ["at most 65535"]),
        ({"cluster__cpus_per_task": 0}, ["cluster.cpus_per_task=0"]),
        ({"cluster__gpus_per_node": -1}, ["cluster.gpus_per_node=-1"]),
        ({"cluster__max_parallel_jobs": 0}, ["cluster.max_parallel_jobs=0"]),
        ({"cluster__snapshot_limit_mib": 0}, ["cluster.snapshot=false"]),
        ({"device": "cuda"}, ["device=cuda", "cluster.gpus_per_node=null", "how many each node"]),
        ({"device": "cuda", "cluster__gpus_per_node": 1}, ["processes_per_node=2", "1 GPU(s) of each node"]),
        ({"checkpoint__enabled": False}, ["cluster.requeue=false"]),
        ({"cluster__sbatch": {"ntasks_per_node": 4}}, ["cluster.sbatch.ntasks_per_node", "one task per node"]),
        ({"cluster__sbatch": {"--time": "1:00"}}, ["cluster.time_limit_min"]),
        ({"cluster__sbatch": {"exclude": ["n1", "n2"]}}, ["not one value", "a,b,c"]),
        ({"cluster__environment": {"A-B": "1"}}, ["'A-B'", "letters"]),
        ({"cluster__environment": {"A": [1, 2]}}, ["cluster.environment.A=[1, 2]", "not one value"]),
        ({"cluster__sbatch": {"output": "x"}}, ["leave it out: logs are in the run's directory"]),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    num_gpus = changes.get("cluster__gpus_per_node") or 0
    with pytest.raises(ConfigurationError) as caught:
        check(slurm_config(**changes), num_gpus)
    for word in words:
        assert word in str(caught.value)


def test_the_jobs_gpus_count_not_those_of_the_machine_that_submits() -> None:
    config = slurm_config(device="auto", cluster__gpus_per_node=4, cluster__processes_per_node=None)
    assert prepare(config) == []
    assert (config.device, config.cluster.processes_per_node) == (Device.cuda, 4)
    config = slurm_config(device="auto")
    assert prepare(config) == ["cluster.gpus_per_node is not set: the job asks for no GPU and trains on CPUs."]
    assert config.device is Device.cpu


RUN = Path.cwd() / "runs" / "own" / "x"


def text(run: Path = RUN, **changes: Any) -> str:
    return batch.batch_file(slurm_config(**changes), run, run / "submission" / "0", run / "submission" / "0" / "code")


class TestBatchFile:
    @pytest.fixture(autouse=True)
    def has_srun(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
        """submitit wants to see one before it writes a file, and starts none."""
        srun = tmp_path_factory.mktemp("bin") / "srun"
        srun.write_text("#!/bin/sh\nexit 1\n")
        srun.chmod(0o755)
        monkeypatch.setenv("PATH", str(srun.parent), prepend=os.pathsep)

    def test_one_task_per_node_and_every_typed_option(self) -> None:
        written = text(
            cluster__partition="long",
            cluster__account="me",
            cluster__qos="high",
            cluster__cpus_per_task=12,
            cluster__gpus_per_node=4,
            cluster__memory_gib=1.5,
            cluster__time_limit_min=90,
            cluster__signal_lead_seconds=200,
        )
        options = ["nodes=2", "ntasks-per-node=1", "partition=long", "account=me", "qos=high", "cpus-per-task=12"]
        options += ["gpus-per-node=4", "mem=1536M", "time=90", "signal=USR2@140", "requeue", "job-name=run"]
        options += [f"chdir={shlex.quote(f'{RUN}/submission/0/code')}"]
        for option in options:
            assert f"#SBATCH --{option}\n" in written, option
        (srun,) = [line for line in written.splitlines() if line.startswith("srun")]
        assert "--cpus-per-task=12" in srun, "srun drops it unless it is told again"
        assert "--kill-on-bad-exit=1" in srun

    def test_a_range_of_nodes_leaves_the_number_of_tasks_to_what_is_there(self) -> None:
        written = text(cluster__nodes="1-2")
        assert "#SBATCH --nodes=1-2\n" in written
        assert "#SBATCH --ntasks" not in written, "SLURM would give no more nodes than the fewest"
        (srun,) = [line for line in written.splitlines() if line.startswith("srun")]
        assert "--ntasks-per-node=1 " in srun

    def test_what_is_not_asked_for_is_left_to_the_cluster(self) -> None:
        written = text()
        for word in ("partition", "account", "qos", "mem", "gpus", "cpus-per-task", "wckey", "array"):
            assert word not in written.partition("# command")[0].replace("submission", ""), word

    def test_other_options_are_passed_on_as_they_are(self) -> None:
        written = text(cluster__sbatch={"constraint": "a100&ib", "exclusive": True, "mail_user": "x@y"})
        assert "#SBATCH --constraint='a100&ib'\n" in written
        assert "#SBATCH --exclusive\n" in written
        assert "#SBATCH --mail-user=x@y\n" in written
        assert "#SBATCH --no-requeue\n" in text(cluster__requeue=False)

    def test_environment_modules_and_setup_come_before_the_workers_in_this_order(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FROM_HERE", "it's")
        written = text(
            cluster__environment={"NCCL_DEBUG": "INFO", "FROM_HERE": None},
            cluster__modules=["cuda/12.8"],
            cluster__setup=["ulimit -l unlimited"],
        ).splitlines()
        start = written.index("export NCCL_DEBUG=INFO")
        assert [line for line in written[start:] if not line.startswith(("tminus_", "trap"))][:4] == [
            "export NCCL_DEBUG=INFO",
            "export FROM_HERE='it'\"'\"'s'",
            "module load cuda/12.8",
            "ulimit -l unlimited",
        ]
        with pytest.raises(RequestError, match="NOT_HERE is not set"):
            text(cluster__environment={"NOT_HERE": None})

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"cluster__setup": ["true", "cp '/no pe' /tmp/", "echo on"]}, "exit code 1 at: cp '/no pe' /tmp/"),
            ({"cluster__setup": ["exit 7"]}, "exit code 7 at: exit 7"),
            ({"cluster__modules": ["nope/1.2"]}, "exit code 127 at: module load nope/1.2"),
            ({"cluster__setup": ["if true; then", "false", "fi"]}, "exit code 1 at: if true; then"),
            ({"cluster__setup": ["false || true", "for i in 1 2; do", "echo $i", "done", "cat <<E", "x", "E"]}, None),
            ({}, None),
        ],
    )
    def test_a_line_of_setup_that_fails_is_named_and_nothing_is_started(
        self, tmp_path: Path, changes: dict[str, Any], named: str | None
    ) -> None:
        script, srun = tmp_path / "job.sh", tmp_path / "srun"
        script.write_text(text(**changes))
        srun.write_text("#!/bin/sh\necho started\n")
        srun.chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
        if named is None:
            assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "started", "")
        else:
            assert done.returncode != 0
            assert "started" not in done.stdout
            assert done.stderr.splitlines()[-1].startswith("launch: the job was not started: ")
            assert done.stderr.splitlines()[-1].endswith(named)

    def test_a_container_sees_the_project_the_code_and_the_runs(self) -> None:
        written = text(
            cluster__container_image="nvcr.io#nvidia/pytorch:26.01",
            cluster__container_mounts=["/data:/data"],
            cluster__python="python3",
        )
        (srun,) = [line for line in written.splitlines() if line.startswith("srun")]
        assert "'--container-image=nvcr.io#nvidia/pytorch:26.01'" in srun
        here, code = Path.cwd(), RUN / "submission" / "0" / "code"
        assert f"--container-mounts={here}:{here},{code}:{code},{here}/runs:{here}/runs,/data:/data" in srun
        assert f"--container-workdir={code}" in srun
        assert " python3 -u -m submitit" in srun

    def test_a_container_sees_a_run_that_lies_elsewhere(self) -> None:
        written = text(Path("/elsewhere/mine"), cluster__container_image="x.sqsh", run_dir="/elsewhere/mine")
        (srun,) = [line for line in written.splitlines() if line.startswith("srun")]
        (mounts,) = [word for word in shlex.split(srun) if word.startswith("--container-mounts=")]
        folders = mounts.partition("=")[2].split(",")
        assert "/elsewhere/mine:/elsewhere/mine" in folders
        runs = Path.cwd() / "runs"
        assert f"{runs}:{runs}" not in folders, "it may not be there, and cannot be mounted then"

    def test_the_batch_file_is_a_shell_script(self, tmp_path: Path) -> None:
        script = tmp_path / "job.sh"
        script.write_text(text(cluster__environment={"A": "b c"}))
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_the_outer_jobs_variables_go_and_the_clusters_address_stays() -> None:
    inside = {"SLURM_JOB_ID": "1", "SLURM_CONF": "/etc/s", "SRUN_X": "1", "SUBMITIT_EXECUTOR": "slurm", "PATH": "p"}
    assert outside_of_jobs(inside) == {"SLURM_CONF": "/etc/s", "PATH": "p"}


def test_a_tasks_place_is_read_from_what_slurm_sets() -> None:
    task = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert JobPlace.from_environment(task) == JobPlace("7", 1, 2, "n[1-2]", 0)
    element = {**task, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    assert JobPlace.from_environment(element) == JobPlace("5_3", 1, 2, "n[1-2]", 2)


def test_the_cpus_of_a_task_are_shared_by_its_workers() -> None:
    assert thread_limit({"SLURM_CPUS_PER_TASK": "1"}, local_world_size=1) == 1
    assert thread_limit({"SLURM_CPUS_PER_TASK": "4096"}, local_world_size=1) == thread_limit({}, local_world_size=1)

"""Runs as jobs of a real SLURM: submitted, stopped, requeued, and brought to the same end whatever happens to them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import make_project
from tests.e2e.session import LAUNCH
from tests.slurm.cluster import Cluster, until
from tests.slurm.runs import PATIENCE_SECONDS, Submitted, launch, submit

pytestmark = pytest.mark.timeout(600)
STEPS = 40
TRAIN = (f"train.max_steps={STEPS}", "job.sleep=0.1", "checkpoint.every_steps=5")
TWO_BY_TWO = ("cluster.nodes=2", "cluster.processes_per_node=2", *TRAIN)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The digests of local runs, by their number of workers."""
    digests = {}
    for workers in (2, 4):
        project = make_project(tmp_path_factory.mktemp(f"local-{workers}") / "project")
        words = ["+experiment=own", "device=cpu", f"cluster.processes_per_node={workers}", f"train.max_steps={STEPS}"]
        subprocess.run([*LAUNCH, *words, "run_dir=run"], cwd=project, check=True, capture_output=True, timeout=300)
        digests[workers] = json.loads((project / "run" / "result.json").read_text())["parameters_digest"]
    return digests


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "a project")


def test_two_nodes_train_what_one_machine_does(cluster: Cluster, project: Path, undisturbed: dict[int, str]) -> None:
    run = submit(cluster, project, *TWO_BY_TWO)
    assert f"submitted: job {run.job_id}, 2 node(s) with 2 worker(s) each" in run.output
    assert "launch status" in run.output
    assert (run.directory / "submission" / "0" / "code" / "own_job.py").is_file()
    run.until_state("finished")
    assert run.digest == undisturbed[4]
    assert run.status["hosts"] == ["node1", "node2"], "rank order follows SLURM's"
    assert cluster.until_state(run.job_id, "COMPLETED")["ExitCode"] == "0:0"
    logs = launch(cluster, project, "logs", "mine").stdout
    assert "[node1 rank 0] rank 0 says call 1" in logs
    assert "[node2 rank 3] rank 3 says call 1" in logs
    shown = launch(cluster, project, "status", "mine").stdout
    assert "state: finished" in shown
    assert f"SLURM: job {run.job_id} COMPLETED" in shown
    # A finished run that SLURM starts again ends with 0 and stays as it is.
    before = (run.directory / "result.json").read_bytes()
    cluster.run("scontrol", "requeue", run.job_id)
    until(lambda: cluster.job(run.job_id)["Restarts"] == "1", "requeued")
    cluster.until_state(run.job_id, "COMPLETED", timeout_seconds=PATIENCE_SECONDS)
    assert (run.directory / "result.json").read_bytes() == before
    assert run.ended == ["finished"]


def test_a_signal_stops_all_ranks_and_the_job_goes_on_by_itself(
    cluster: Cluster, project: Path, undisturbed: dict[int, str]
) -> None:
    run = submit(cluster, project, *TWO_BY_TWO)
    run.until_step(4)
    cluster.run("scancel", "--signal=USR2", run.job_id)
    until(lambda: len(run.attempts) == 1, "stopped", PATIENCE_SECONDS)
    stopped = run.attempts[0]
    assert (stopped["ended"], stopped["checkpoint"]) == ("resumable", stopped["last_step"])
    assert "stopped on request (SIGUSR2) after step" in stopped["reason"]
    run.until_state("finished")
    assert run.digest == undisturbed[4]
    assert run.ended == ["resumable", "finished"]
    assert run.steps() == list(range(1, STEPS + 1)), "no step twice, none left out"
    assert cluster.job(run.job_id)["Restarts"] == "1"


def test_a_killed_worker_restarts_the_group_in_the_same_allocation(
    cluster: Cluster, project: Path, undisturbed: dict[int, str]
) -> None:
    kill = ("job.fail=kill once", "job.fail_rank=3", "job.fail_call=12", "cluster.max_restarts=1")
    run = submit(cluster, project, *TWO_BY_TWO, *kill)
    run.until_state("finished")
    assert run.digest == undisturbed[4]
    assert run.ended == ["failed", "finished"]
    assert "rank 3: The worker was killed by SIGKILL" in run.attempts[0]["reason"]
    assert run.steps(1)[0] == (run.attempts[0]["checkpoint"] or 0) + 1, "from the newest checkpoint"
    assert cluster.job(run.job_id)["Restarts"] == "0"


def test_a_failure_that_comes_back_ends_the_job_with_its_reason(cluster: Cluster, project: Path) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "job.fail=raise", "job.fail_rank=2", "job.fail_call=3")
    until(lambda: run.status["state"] == "failed" and cluster.state(run.job_id) == "FAILED", run.told(), 240)
    assert run.ended == ["failed"] * 4, "max_restarts=3"
    assert "rank 2: ValueError: boom on purpose" in run.status["reason"]
    assert "cluster.max_restarts=3" in run.status["reason"]
    assert cluster.job(run.job_id)["Restarts"] == "0"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_ends_early_with_code_0_is_named(cluster: Cluster, project: Path, workers: int) -> None:
    early = ("job.fail=exit0", "job.fail_rank=1", "job.fail_call=6", "cluster.max_restarts=0")
    run = submit(cluster, project, "cluster.nodes=2", f"cluster.processes_per_node={workers}", *TRAIN, *early)
    run.until_state("failed")
    reason = run.status["reason"]
    assert reason.startswith("rank 1: The worker ended with exit code 0 before the run was finished"), run.told()
    assert "\n" not in reason
    cluster.until_state(run.job_id, "FAILED")


def test_the_time_limit_stops_saves_and_requeues(cluster: Cluster, project: Path, undisturbed: dict[int, str]) -> None:
    limit = ("cluster.time_limit_min=2", "cluster.signal_lead_seconds=95", "job.sleep=0.7")
    run = submit(cluster, project, *TWO_BY_TWO, *limit)
    until(lambda: len(run.attempts) >= 1, "stopped", PATIENCE_SECONDS)
    assert run.ended[0] == "resumable", run.told()
    assert run.attempts[0]["checkpoint"] == run.attempts[0]["last_step"]
    run.until_state("finished", timeout_seconds=480)
    assert run.digest == undisturbed[4]
    assert set(run.ended[:-1]) == {"resumable"}


def test_a_lost_node_requeues_and_its_survivors_cannot_harm(
    cluster: Cluster, project: Path, undisturbed: dict[int, str]
) -> None:
    """slurmd dies on the only node of a job: SLURM starts it on the other one, while the first still trains."""
    run = submit(cluster, project, "cluster.processes_per_node=2", *TRAIN, "job.sleep=1.0")
    run.until_step(6)
    first = run.status["hosts"][0]
    cluster.control("kill-slurmd", first)
    killed = len(run.steps(0))
    until(lambda: json.loads((run.directory / "attempt.json").read_text())["attempt"] == 1, "a second attempt", 240)
    assert len(run.steps(0)) > killed, "the survivors have trained on, cut off from SLURM"
    run.until_step(STEPS - 5, attempt=1)
    before = len(run.steps(0))
    run.until_state("finished")
    assert len(run.steps(0)) == before, "they have ended"
    assert run.status["hosts"] != [first]
    assert run.digest == undisturbed[2]
    assert run.ended == ["killed", "finished"]


@pytest.mark.parametrize(
    ("fault", "node"), [("kill-slurmd", "node2"), ("kill-slurmd", "node1"), ("link-down", "node2")]
)
def test_a_job_of_two_nodes_comes_back_after_one_is_lost(
    cluster: Cluster, project: Path, undisturbed: dict[int, str], fault: str, node: str
) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "job.sleep=1.5")
    run.until_step(8)
    cluster.control(fault, node)
    until(lambda: cluster.job(run.job_id)["Restarts"] == "1", "requeued", 90)
    cluster.control("link-up" if fault == "link-down" else "restart-slurmd", node)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
    run.until_state("finished")
    assert run.digest == undisturbed[4]
    assert run.ended[-1] == "finished"
    assert run.attempts[-1]["first_step"] > 5, "from the newest checkpoint"


def test_cancel_ends_a_job_for_good_or_saves_it(cluster: Cluster, project: Path) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "train.max_steps=10000")
    run.until_step(3)
    refused = launch(cluster, project, "resume", "mine", check=False)
    assert refused.returncode == 2
    assert f"job {run.job_id} RUNNING: it goes on by itself" in refused.stderr
    saved = launch(cluster, project, "cancel", "mine", "--save", "--no-requeue").stdout
    assert "is resumable: stopped on request (cancelled by" in saved
    assert "to go on: launch resume" in saved
    job = cluster.until_state(run.job_id, "FAILED")
    assert (job["Restarts"], job["ExitCode"]) == ("0", "75:0")
    again = launch(cluster, project, "resume", "mine").stdout
    assert f"submitted: job {run.job_id}" in again
    assert (run.directory / "submission" / "1").is_dir()
    step = run.attempts[0]["checkpoint"]
    run.until_step(step + 2, attempt=1)
    ended = launch(cluster, project, "cancel", "mine").stdout
    assert "is failed: cancelled by" in ended
    assert cluster.state(run.job_id) == "CANCELLED"
    assert run.ended == ["resumable", "failed"]


def test_cancel_save_saves_and_the_job_goes_on_by_itself(
    cluster: Cluster, project: Path, undisturbed: dict[int, str]
) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "job.sleep=0.3")
    run.until_step(4)
    said = launch(cluster, project, "cancel", "mine", "--save").stdout
    assert f"asked job {run.job_id} to stop and save, and to go on" in said
    assert re.search(r"is submitted: stopped on request \(asked for by .*\) after step \d+; back in the queue", said)
    assert f"job {run.job_id} goes on by itself" in said
    waits = launch(cluster, project, "cancel", "mine", "--save", check=False)
    assert waits.returncode == 2, waits
    assert f"Job {run.job_id} waits in the queue (BeginTime) and goes on by itself: there is nothing" in waits.stderr
    run.until_state("finished")
    assert run.digest == undisturbed[4]
    assert run.ended == ["resumable", "finished"]
    assert run.steps() == list(range(1, STEPS + 1)), "no step twice, none left out"
    assert cluster.job(run.job_id)["Restarts"] == "1"


def test_a_job_that_may_not_be_requeued_is_saved_and_stays_stopped(cluster: Cluster, project: Path) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "train.max_steps=10000", "cluster.requeue=false")
    run.until_step(3)
    refused = launch(cluster, project, "cancel", "mine", "--save", "--requeue", check=False)
    assert refused.returncode == 2
    assert "cluster.requeue=false" in refused.stderr
    said = launch(cluster, project, "cancel", "mine", "--save").stdout
    assert "is resumable: stopped on request" in said
    assert "to go on: launch resume" in said
    assert cluster.until_state(run.job_id, "FAILED")["ExitCode"] == "75:0"


def test_a_job_that_waits_is_taken_out_of_the_queue_to_be_resumed(cluster: Cluster, project: Path) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "train.max_steps=2", "+cluster.sbatch.begin=now+1hour")
    launch(cluster, project, "cancel", "mine", "--save", "--no-requeue")
    assert run.status["state"] == "resumable"
    assert cluster.state(run.job_id) == "CANCELLED"
    launch(cluster, project, "resume", "mine", "~cluster.sbatch.begin")
    run.until_state("finished")


def test_scancel_ends_a_job_for_good(cluster: Cluster, project: Path) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "train.max_steps=10000")
    run.until_step(3)
    cluster.run("scancel", run.job_id)
    cluster.until_state(run.job_id, "CANCELLED")
    until(lambda: "RUNNING" not in cluster.run("squeue").stdout, "gone")
    until(lambda: not json.loads(launch(cluster, project, "status", "mine", "--json").stdout)["alive"], "ended", 60)
    shown = launch(cluster, project, "status", "mine").stdout
    assert "cancelled (scancel)" in shown or "CANCELLED" in shown
    assert cluster.job(run.job_id)["Restarts"] == "0"
    time.sleep(7)  # a requeued job would be back by now
    assert cluster.state(run.job_id) == "CANCELLED"


def test_a_job_that_waits_is_shown_and_cancelled(cluster: Cluster, project: Path) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "+cluster.sbatch.begin=now+1hour")
    shown = launch(cluster, project, "status", "mine").stdout
    assert "state: submitted" in shown
    assert f"SLURM: job {run.job_id} PENDING (BeginTime)" in shown
    assert "PENDING" in launch(cluster, project, "ls").stdout
    launch(cluster, project, "cancel", "mine")
    assert run.status["state"] == "failed"
    assert run.status["reason"].startswith("cancelled by")
    assert cluster.state(run.job_id) == "CANCELLED"


def test_a_node_that_does_not_come_is_named(cluster: Cluster, project: Path) -> None:
    slow = project / "slow_python"
    slow.write_text(f'#!/bin/sh\n[ "$SLURM_NODEID" = 1 ] && sleep 300\nexec {LAUNCH[0]} "$@"\n')
    slow.chmod(0o755)
    late = (f"cluster.python='{slow}'", "cluster.rendezvous_timeout_seconds=6")
    run = submit(cluster, project, *TWO_BY_TWO, *late)
    until(lambda: run.status["state"] == "failed", run.told(), 120)
    assert "node(s) that did not join the run: node2 (2 of 2): nothing was heard of it" in run.status["reason"]
    cluster.until_state(run.job_id, "FAILED")


def test_an_interface_that_is_not_there_is_named(cluster: Cluster, project: Path) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "cluster.interface=ib7")
    until(lambda: run.status["state"] == "failed", run.told(), 120)
    assert "cluster.interface=ib7: node1 has no such interface" in run.status["reason"]
    assert "eth0 (10.77.0.1)" in run.status["reason"]


def test_the_code_that_runs_is_the_code_as_submitted(cluster: Cluster, project: Path) -> None:
    hold = ("+cluster.sbatch.begin=now+1hour", "cluster.processes_per_node=2", "train.max_steps=4")
    run = submit(cluster, project, *hold)
    shutil.move(project / "own_job.py", project / "gone.py")
    cluster.run("scontrol", "update", f"JobId={run.job_id}", "StartTime=now")
    run.until_state("finished")
    assert run.steps() == [1, 2, 3, 4]


def test_a_sweep_is_an_array_and_only_what_is_missing_is_submitted_again(cluster: Cluster, project: Path) -> None:
    sweep = ("-m", "+experiment=own", "cluster=slurm", "device=cpu", "cluster.processes_per_node=1")
    sweep += ("train.global_batch_size=4", "train.max_steps=6", "cluster.max_parallel_jobs=2", "job.sleep=0.3")
    sweep += ("job.fail=raise once", "job.fail_rank=0", "job.fail_call=2,900", "optimizer.lr=1e-2,1e-3")
    sweep += ("cluster.max_restarts=0",)
    done = launch(cluster, project, *sweep)
    assert "4 run(s), 2 at once" in done.stdout
    most = 0
    runs = [Submitted(cluster, project, path, "") for path in (project / "runs" / "own").iterdir()]
    assert len(runs) == 4
    array = runs[0].job_id.partition("_")[0]
    assert {run.job_id for run in runs} == {f"{array}_{index}" for index in range(4)}

    def ended() -> bool:
        nonlocal most
        most = max(most, cluster.run("squeue", "--noheader", "--states=RUNNING").stdout.count("\n"))
        return all(run.status["state"] in ("finished", "failed") for run in runs)

    until(ended, "the sweep", PATIENCE_SECONDS)
    assert most == 2
    assert sorted(run.status["state"] for run in runs) == ["failed", "finished", "finished", "finished"]
    again = launch(cluster, project, *sweep).stdout
    assert again.count("has finished") == 3
    assert "1 run(s)" in again
    (failed,) = [run for run in runs if run.status["state"] != "finished"]
    failed.until_state("finished") if failed.status["state"] == "submitted" else None
    until(lambda: all(run.status["state"] == "finished" for run in runs), "the rest", PATIENCE_SECONDS)
    assert len(list((project / "runs" / "own").iterdir())) == 4
    assert "4 left as they are" in launch(cluster, project, *sweep).stdout


def test_waiting_for_a_job_ends_with_its_exit_code(cluster: Cluster, project: Path) -> None:
    wait = ("cluster=slurm", "device=cpu", "cluster.processes_per_node=2", "cluster.wait=true", "run_dir=mine")
    done = launch(cluster, project, "+experiment=own", *wait, "cluster.max_restarts=0", "job.fail=raise", check=False)
    assert done.returncode == 1
    assert "boom on purpose" in done.stdout
    assert "is failed: rank 1: ValueError" in done.stdout


def test_check_prints_the_batch_file_and_asks_slurm(cluster: Cluster, project: Path) -> None:
    words = ("check", "+experiment=own", "device=cpu", "cluster=slurm", "cluster.nodes=2", "cluster.cpus_per_task=3")
    done = launch(cluster, project, *words)
    assert "#SBATCH --nodes=2" in done.stdout
    assert "--cpus-per-task=3 " in done.stdout, "for srun, which does not inherit it"
    assert "to start at" in done.stdout
    assert not (project / "runs").exists()
    refused = launch(cluster, project, *words, "cluster.partition=nowhere", check=False)
    assert refused.returncode == 2
    assert "nvalid partition" in refused.stderr
    submitted = launch(cluster, project, *words[1:], "cluster.partition=nowhere", "run_dir=mine", check=False)
    assert submitted.returncode == 2
    assert "sbatch has refused the job" in submitted.stderr
    assert "Traceback" not in submitted.stderr
    assert not (project / "mine").exists(), "nothing is left of what was not submitted"


def test_a_job_is_submitted_from_inside_a_job(cluster: Cluster, project: Path) -> None:
    inner = f"{LAUNCH[0]} -m launcher +experiment=own device=cpu cluster=slurm cluster.processes_per_node=1"
    outer = cluster.submit(f"{inner} train.max_steps=2 run_dir=mine", project, "--mem=100", "--ntasks=2")
    cluster.until_state(outer, "COMPLETED", timeout_seconds=120)
    run = Submitted(cluster, project, project / "mine", "")
    assert run.job_id != str(outer)
    run.until_state("finished")
    assert cluster.job(run.job_id)["NumNodes"] == "1"


def test_a_preempted_job_saves_makes_room_and_goes_on(
    cluster: Cluster, project: Path, undisturbed: dict[int, str]
) -> None:
    run = submit(cluster, project, *TWO_BY_TWO, "job.sleep=0.3")
    run.until_step(4)
    urgent = cluster.submit("sleep 3", project, "--partition=urgent", "--nodes=2", "--exclusive", "--mem=0")
    cluster.until_state(urgent, "COMPLETED", timeout_seconds=PATIENCE_SECONDS)
    run.until_state("finished")
    assert run.digest == undisturbed[4]
    assert run.ended == ["resumable", "finished"]
    assert run.steps() == list(range(1, STEPS + 1)), "no step twice, none left out"

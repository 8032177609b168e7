"""The test cluster itself: what other tests rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.slurm.cluster import TESTCLUSTER, Cluster, down, until, up

ALL_REDUCE = """
import os, socket, torch, torch.distributed as dist
rank = int(os.environ["SLURM_PROCID"])
dist.init_process_group("gloo", init_method="tcp://{address}:29500", rank=rank, world_size=2)
value = torch.tensor([float(rank + 1)])
dist.all_reduce(value)
print(socket.gethostname(), value.item(), os.environ["CUDA_VISIBLE_DEVICES"])
dist.destroy_process_group()
"""

RECEIVE = """
import socket
connection, _ = socket.create_server(("10.77.0.1", 5000)).accept()
while connection.recv(1 << 20):
    pass
"""
SEND = """
import socket, time
while True:
    try:
        connection = socket.create_connection(("10.77.0.1", 5000))
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
began = time.monotonic()
connection.sendall(bytes(5_000_000))
connection.shutdown(socket.SHUT_WR)
connection.recv(1)
print(time.monotonic() - began)
"""


def test_a_job_on_two_nodes_reduces_over_their_network(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "reduce.py"
    program.write_text(ALL_REDUCE.format(address=cluster.nodes()["node1"]["address"]))
    environment = {"OMP_NUM_THREADS": "1"}
    step = ("srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", sys.executable, str(program))
    printed = cluster.run(*step, environment=environment).stdout
    assert sorted(printed.splitlines()) == ["node1 3.0 0,1", "node2 3.0 0,1"]


def test_a_signal_reaches_every_task_of_a_job(cluster: Cluster, tmp_path: Path) -> None:
    task = "trap 'echo heard on $(hostname); exit 0' USR2; echo ready; while :; do sleep 0.1; done"
    job = cluster.submit(f'srun bash -c "{task}"'.replace("$(", r"\$("), tmp_path, "--nodes=2", "--output=out.txt")
    until(lambda: _text(tmp_path / "out.txt").count("ready") == 2, "both tasks")
    cluster.run("scancel", "--signal=USR2", str(job))
    cluster.until_state(job, "COMPLETED")
    assert sorted(line for line in _text(tmp_path / "out.txt").splitlines() if "heard" in line) == [
        "heard on node1",
        "heard on node2",
    ]


def test_lost_nodes_are_seen_and_their_jobs_come_back_though_the_old_processes_live_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    script = "srun bash -c 'while :; do date +%s%N > beat-$(hostname)-${SLURM_RESTART_COUNT:-0}; sleep 0.1; done'"
    faults = {"node1": ("kill-slurmd", "restart-slurmd"), "node2": ("link-down", "link-up")}
    jobs = {
        node: cluster.submit(script, tmp_path, f"--nodelist={node}", "--requeue", "--output=out.txt") for node in faults
    }
    beats = {node: tmp_path / f"beat-{node}-0" for node in faults}
    until(lambda: all(beat.exists() for beat in beats.values()), "both jobs at work")
    for node, (fault, _) in faults.items():
        cluster.control(fault, node)
    for node, job in jobs.items():
        cluster.until_node(node, "DOWN*")
        assert cluster.until_state(job, "PENDING")["Restarts"] == "1"
    before = {node: _text(beat) for node, beat in beats.items()}
    until(lambda: all(_text(beat) not in (before[node], "") for node, beat in beats.items()), "both still at work")
    for node, (_, repair) in faults.items():
        cluster.control(repair, node)
    until(lambda: all((tmp_path / f"beat-{node}-1").exists() for node in faults), "both jobs at work again")


def test_a_node_without_power_is_seen_and_its_job_goes_to_another(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("hostname; sleep 100", tmp_path, "--nodes=1", "--requeue", "--output=out.txt")
    lost = cluster.until_state(job, "RUNNING")["NodeList"]
    cluster.control("power-off", lost)
    until(lambda: cluster.job(job)["Restarts"] == "1", "a restart")
    assert cluster.until_state(job, "RUNNING")["NodeList"] != lost
    cluster.control("power-on", lost)
    cluster.until_node(lost, "IDLE")


def test_a_more_urgent_job_preempts(cluster: Cluster, tmp_path: Path) -> None:
    low = cluster.submit("trap '' TERM; sleep 1000", tmp_path, "--nodes=2", "--exclusive", "--output=out.txt")
    cluster.until_state(low, "RUNNING")
    high = cluster.submit("true", tmp_path, "--nodes=2", "--exclusive", "--partition=urgent", "--output=high.txt")
    cluster.until_state(high, "COMPLETED", timeout_seconds=90)
    assert cluster.job(low)["Restarts"] == "1"


def test_links_have_the_rate_asked_for(spare: Path) -> None:
    assert up(spare, ["--rate=100mbit", "--nodes=1", "--gpus=0"]).returncode == 0
    cluster = Cluster(spare)
    words = [*cluster.prefix[:-1], "--on", "node1", "--", sys.executable, "-c", RECEIVE]
    with subprocess.Popen(words):
        seconds = float(cluster.run(sys.executable, "-c", SEND).stdout)
    assert 0.3 < seconds < 1.5, "40 Mbit at 100 Mbit/s"


def test_two_clusters_do_not_see_each_other(cluster: Cluster, spare: Path) -> None:
    assert up(spare, ["--nodes=1"]).returncode == 0
    assert list(Cluster(spare).nodes()) == ["node1"]
    assert list(cluster.nodes()) == ["node1", "node2"]


def test_up_twice_is_up_once_and_another_cluster_is_refused(spare: Path) -> None:
    assert up(spare, ["--nodes=1"]).returncode == 0
    before = _marked(spare)
    assert up(spare, ["--nodes=1"]).returncode == 0
    assert _marked(spare) == before
    refused = up(spare, ["--nodes=3"])
    assert refused.returncode == 2
    assert "is another" in refused.stderr


def test_down_leaves_nothing_behind(spare: Path, tmp_path: Path) -> None:
    assert up(spare).returncode == 0
    cluster = Cluster(spare)
    job = cluster.submit("srun bash -c 'setsid sleep 1234 & sleep 1000'", tmp_path, "--nodes=2", "--output=out.txt")
    cluster.until_state(job, "RUNNING")
    until(
        lambda: sum(_words(pid) == b"sleep\0001234\0" for pid in _marked(spare)) == 2,
        "processes in sessions of their own",
    )
    made = _namespaces(_marked(spare)) - _namespaces([os.getpid()])
    assert len(made) == 3 * 4, "network, host name, mounts and processes of three hosts"
    assert not _seen_outside(spare)
    down(spare)
    assert _marked(spare) == []
    assert not spare.exists()
    assert not made & _namespaces(_processes())
    assert not _seen_outside(spare)
    down(spare)


def test_an_up_that_fails_halfway_leaves_nothing_behind(spare: Path) -> None:
    failed = up(spare, ["--rate=nonsense"])
    assert failed.returncode == 1
    assert "nonsense" in failed.stderr
    assert _marked(spare) == []
    assert not spare.exists()
    assert not _seen_outside(spare)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_cluster_ends_with_the_process_it_was_for(spare: Path, number: signal.Signals) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(TESTCLUSTER.parents[1])!r})\n"
        "import time, pathlib\nfrom tests.slurm.cluster import up\n"
        f"assert up(pathlib.Path({str(spare)!r}), ['--nodes=1']).returncode == 0\nprint('up', flush=True)\n"
        "time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        owner.send_signal(number)
    until(lambda: not _marked(spare) and not spare.exists(), "the cluster gone", 15)


def test_a_wrong_request_is_told_in_one_line(cluster: Cluster) -> None:
    words = [str(TESTCLUSTER), "link-down", "--directory", str(cluster.directory), "node9"]
    refused = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "testcluster: there is no node node9; there are node1, node2\n"


@pytest.fixture
def spare(session_cluster: Cluster) -> Iterator[Path]:
    """A directory for another cluster, which is taken down."""
    directory = Path(f"/run/tminus-testcluster-{os.getpid()}-spare")
    yield directory
    down(directory)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _processes() -> list[int]:
    """Those that have not ended: one that has may wait for long to be taken note of."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(entry.name)] * (state not in "ZX")
    return found


def _marked(directory: Path) -> list[int]:
    entry = f"TMINUS_TESTCLUSTER={directory}".encode()
    found = []
    for pid in _processes():
        with suppress(OSError):  # it has ended
            if entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return sorted(found)


def _namespaces(pids: list[int]) -> set[str]:
    found = set()
    for pid in pids:
        for kind in ("net", "uts", "mnt", "pid"):
            with suppress(OSError):
                found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
    return found


def _seen_outside(directory: Path) -> list[str]:
    """What this machine's own network and file system show of a cluster: nothing, at any time."""
    links = [name for name in os.listdir("/sys/class/net") if name == "switch" or name.startswith("to-node")]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return links + [mount for mount in mounts if str(directory) in mount or "/etc/hosts" in mount]

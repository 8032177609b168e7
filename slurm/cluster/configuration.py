"""What the cluster is to be, and the files that tell SLURM so."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["HEAD", "HEAD_ADDRESS", "Options", "Places", "slurm_conf", "write_files"]

HEAD = "head"
"""The controller's host name."""
_NETWORK = "10.77.0"
"""Inside the cluster's own namespaces alone: two clusters may both have it."""
HEAD_ADDRESS = f"{_NETWORK}.254"
_NULL_DEVICE = os.makedev(1, 3)


@dataclass(frozen=True)
class Options:
    """A cluster as it was asked for."""

    nodes: int = 2
    """Hosts with a slurmd: node1, node2 …"""
    gpus: int = 2
    """Made-up GPUs of each node: a GRES on a device file that is like /dev/null."""
    cpus: int = 4
    """That each node claims to have, whatever the machine has (but for ``bind_cpus``)."""
    memory_mib: int = 8000
    """That each node claims to have."""
    rate: str | None = None
    """The links' speed, each way, in tc's words such as 1gbit; None: as fast as the machine."""
    slurmd_timeout_seconds: int = 8
    """A node that does not answer is DOWN after this and some ten seconds more, and its jobs are requeued."""
    requeue_delay_seconds: int = 5
    """A requeued job waits so long (SLURM's own default is 120)."""
    bind_cpus: bool = False
    """Each task is bound to its CPUs; a node then claims no more than the machine has, and all have the same ones."""

    @property
    def names(self) -> list[str]:
        """Of the nodes."""
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def cpus_of_a_node(self) -> int:
        """That it claims to have."""
        return min(self.cpus, os.cpu_count() or 1) if self.bind_cpus else self.cpus

    @property
    def task_plugin(self) -> str:
        """SLURM's."""
        return "task/affinity" if self.bind_cpus else "task/none"

    def address(self, node: str) -> str:
        """Of a node's eth0."""
        return f"{_NETWORK}.{self.names.index(node) + 1}"


@dataclass(frozen=True)
class Places:
    """The names of the files in a cluster's directory."""

    directory: Path

    @property
    def options(self) -> Path:
        """What was asked for; it marks the directory as a cluster's."""
        return self.directory / "cluster.json"

    @property
    def ready(self) -> Path:
        """There once all nodes have been idle."""
        return self.directory / "ready"

    @property
    def hosts(self) -> Path:
        """/etc/hosts of all hosts."""
        return self.directory / "hosts"

    @property
    def slurm_conf(self) -> Path:
        """For the daemons, and for SLURM_CONF."""
        return self.directory / "slurm.conf"

    @property
    def munge_key(self) -> Path:
        """The cluster's secret."""
        return self.directory / "munge.key"

    @property
    def munge_socket(self) -> Path:
        """Where all daemons and commands reach munged."""
        return self.directory / "munge.socket"

    @property
    def logs(self) -> Path:
        """Of the daemons."""
        return self.directory / "logs"

    def log(self, name: str) -> Path:
        """Of one daemon."""
        return self.logs / f"{name}.log"

    def pid(self, name: str) -> Path:
        """For a host, its first process, as this machine numbers it; for a daemon, as its host does."""
        return self.directory / "pids" / name

    def read_options(self) -> Options | None:
        """What was asked for, if there is a cluster."""
        try:
            return Options(**json.loads(self.options.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def write_files(places: Places, options: Options) -> None:
    """Make the directory and all that SLURM reads."""
    root = places.directory
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    places.options.write_text(json.dumps(asdict(options)))
    for folder in ("logs", "pids", "state", "devices", *(f"spool/{name}" for name in options.names)):
        (root / folder).mkdir(mode=0o755, parents=True)
    places.munge_key.touch(mode=0o400)
    places.munge_key.write_bytes(os.urandom(1024))
    for number in range(options.gpus):
        # slurmd counts a GPU only if it has a device file: a number alone drains the node.
        os.mknod(root / "devices" / f"gpu{number}", stat.S_IFCHR | 0o666, _NULL_DEVICE)
    addresses = [f"{options.address(name)} {name}" for name in options.names]
    places.hosts.write_text("\n".join(["127.0.0.1 localhost", f"{HEAD_ADDRESS} {HEAD}", *addresses, ""]))
    places.slurm_conf.write_text(slurm_conf(places, options))
    (root / "gres.conf").write_text(_gres_conf(root, options))


def _gres_conf(root: Path, options: Options) -> str:
    if options.gpus == 0:
        return "AutoDetect=off\n"
    last = f"gpu[0-{options.gpus - 1}]" if options.gpus > 1 else "gpu0"
    return f"AutoDetect=off\nName=gpu File={root}/devices/{last}\n"


def slurm_conf(places: Places, options: Options) -> str:
    """The text of slurm.conf."""
    root = places.directory
    gres = f"Gres=gpu:{options.gpus}" if options.gpus else ""
    node = f"CPUs={options.cpus_of_a_node} RealMemory={options.memory_mib} {gres} State=UNKNOWN"
    nodes = [f"NodeName={name} NodeAddr={options.address(name)} {node}" for name in options.names]
    return "\n".join([_SETTINGS.format(root=root, socket=places.munge_socket, options=options), *nodes, _PARTITIONS])


_SETTINGS = """\
ClusterName=testcluster
SlurmctldHost=head(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire={options.requeue_delay_seconds}
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/pids/slurmctld
SlurmdPidFile={root}/pids/slurmd-%n
SlurmctldLogFile={root}/logs/slurmctld.log
SlurmdLogFile={root}/logs/%n.log

# One kernel for all nodes: no cgroups, and, unless they are bound to, CPUs that are not there.
ProctrackType=proctrack/linuxproc
TaskPlugin={options.task_plugin}
SlurmdParameters=config_overrides
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
GresTypes=gpu

# Faults are seen soon, and what they have stopped comes back soon.
JobRequeue=1
ReturnToService=2
SlurmdTimeout={options.slurmd_timeout_seconds}
MessageTimeout=6
KillWait=10
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

# There is no accounting, so no sacct: ended jobs stay visible to scontrol and squeue for an hour.
MinJobAge=3600
JobCompType=jobcomp/filetxt
JobCompLoc={root}/logs/jobs.txt
"""
_PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""

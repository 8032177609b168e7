"""Is the network between these nodes well? Run it in the job's allocation, before the job, one task per node:

    srun --ntasks-per-node=1 python slurm/preflight.py

Every node does all-reduces with several others, two at a time, then all do one together. Nodes that are missing, cannot
be reached or are slow are named; the exit code is 0 if there are none, else 1. NCCL where there are GPUs, else gloo.
It needs torch and T-minus, as the training does: so it tries the same libraries, interfaces and NCCL settings.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from verdict import NodeReport, problems, rounds, table

from launcher.clusters.slurm.network import address_of, address_towards, interface_of
from launcher.clusters.slurm.queue import hostnames

_REPEATS = 5
_DEFAULT_TIMEOUT_SECONDS = 30
_PATIENCE = 6
"""Timeouts that a failure may take: gloo tries to connect four times."""


def main() -> int:
    """One node's part; the first prints the verdict."""
    asked = _arguments()
    if "SLURM_STEP_ID" not in os.environ:
        print("preflight: run it with srun: srun --ntasks-per-node=1 python slurm/preflight.py", file=sys.stderr)
        return 2
    if os.environ["SLURM_NTASKS"] != os.environ["SLURM_NNODES"]:
        print("preflight: one task per node, please: srun --ntasks-per-node=1 …", file=sys.stderr)
        return 2
    names = hostnames(os.environ["SLURM_STEP_NODELIST"])
    rank = int(os.environ["SLURM_PROCID"])
    others = [name for name in names if name != names[rank]]
    address = address_of(asked.interface) if asked.interface else address_towards(others[0]) if others else "127.0.0.1"
    if interface := asked.interface or interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if asked.interface:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", asked.interface)
    store = _meet(rank, address, asked)
    store.set(f"here/{rank}", "")
    present = _present(store, rank, names, asked.timeout)
    if rank not in present:
        print(f"preflight: {names[rank]} came too late", file=sys.stderr)
        return 1
    report = _measure(store, [names[one] for one in present], present.index(rank), address, asked)
    together = _together(store, present, rank, asked) if not report.failures else None
    store.set(f"report/{rank}", json.dumps(asdict(report)))
    if rank != present[0]:
        store.wait(["done"], timedelta(seconds=_PATIENCE * asked.timeout * (asked.partners + 1)))
        return 0
    return _conclude(store, names, present, together, asked)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preflight", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mebibytes", type=float, default=64, help="of FP32 in each all-reduce (%(default)s)")
    parser.add_argument("--partners", type=int, default=8, help="other nodes that each is tried with (%(default)s)")
    parser.add_argument("--at-least", type=float, metavar="GB/S", help="that each pair must reach; none")
    parser.add_argument("--interface", help="such as ib0; the one whose route leads to the other nodes")
    parser.add_argument(
        "--timeout", type=int, default=_DEFAULT_TIMEOUT_SECONDS, help="seconds to wait for a node (%(default)s)"
    )
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="that all nodes share, for one small file")
    return parser.parse_args()


def _meet(rank: int, address: str, asked: argparse.Namespace) -> dist.TCPStore:
    """The first node opens a port and says which in a file; the others come."""
    place = asked.folder / f".preflight-{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    patience = timedelta(seconds=asked.timeout)
    if rank == 0:
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience)
        staged = place.with_suffix(".new")
        staged.write_text(f"{address}:{store.port}")
        staged.rename(place)
        return store
    deadline = time.monotonic() + asked.timeout
    while not place.exists():
        if time.monotonic() > deadline:
            sys.exit(f"preflight: {socket.gethostname()} sees no {place}: is the first node up, is the folder shared?")
        time.sleep(0.1)
    head, _, port = place.read_text().rpartition(":")
    try:
        return dist.TCPStore(head, int(port), is_master=False, timeout=patience)
    except (dist.DistError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        sys.exit(f"preflight: {socket.gethostname()} cannot reach the first node at {head} port {port}: {reason}")


def _present(store: dist.TCPStore, rank: int, names: list[str], timeout: int) -> list[int]:
    """The ranks that have come in time; the first decides."""
    if rank == 0:
        deadline = time.monotonic() + timeout
        here = [0]
        while len(here) < len(names) and time.monotonic() < deadline:
            time.sleep(0.1)
            here = [one for one in range(len(names)) if store.check([f"here/{one}"])]
        store.set("present", json.dumps(here))
    store.wait(["present"], timedelta(seconds=2 * timeout))
    found: list[int] = json.loads(store.get("present"))
    return found


def _measure(store: dist.TCPStore, names: list[str], index: int, address: str, asked: argparse.Namespace) -> NodeReport:
    """All-reduces with one partner after another; a round begins when all have ended the one before."""
    report = NodeReport(names[index], address)
    milliseconds = []
    waited_for = set(range(len(names)))
    for number, pairs in enumerate(rounds(len(names), asked.partners)):
        pair = next((pair for pair in pairs if index in pair), None)
        if pair is not None:
            partner = names[pair[0] if pair[1] == index else pair[1]]
            try:
                _open_group(store, f"round-{number}/{pair[0]}-{pair[1]}", pair.index(index), 2, asked.timeout)
                seconds = _all_reduce_seconds(asked.mebibytes)
                report.speeds[partner] = asked.mebibytes * 2**20 / seconds / 1e9
                milliseconds.append(1e3 * _all_reduce_seconds(0))
            except (dist.DistError, RuntimeError) as error:
                report.failures[partner] = str(error).partition("\n")[0][:120]
            finally:
                _close_group()
        store.set(f"round-{number}/ended/{index}", "")
        for one in sorted(waited_for):
            try:
                store.wait([f"round-{number}/ended/{one}"], timedelta(seconds=_PATIENCE * asked.timeout))
            except (dist.DistError, RuntimeError):
                waited_for.discard(one)
    return NodeReport(names[index], address, report.speeds, median(milliseconds or [0.0]), report.failures)


def _open_group(store: dist.TCPStore, name: str, rank: int, size: int, timeout: int) -> None:
    dist.init_process_group(
        _backend(),
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )


def _close_group() -> None:
    if not dist.is_initialized():
        # An opening that has failed has used up a name all the same, and the partners' names must be equal: names
        # begin anew once a group has been closed, be it one of this process alone.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()


def _together(store: dist.TCPStore, present: list[int], rank: int, asked: argparse.Namespace) -> float | None:
    """GB/s on each link in an all-reduce of all nodes; None if it failed."""
    size = len(present)
    if size < 2:
        return None
    try:
        _open_group(store, "together", present.index(rank), size, asked.timeout)
        seconds = _all_reduce_seconds(asked.mebibytes)
    except (dist.DistError, RuntimeError):  # a node that has failed with a partner is not here
        return None
    finally:
        _close_group()
    return asked.mebibytes * 2**20 * 2 * (size - 1) / size / seconds / 1e9


def _all_reduce_seconds(mebibytes: float) -> float:
    """Of one all-reduce over the current process group: the median of several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.zeros(max(1, int(mebibytes * 2**18)), device=device)
    times = []
    for _ in range(_REPEATS + 1):  # the first one also connects
        began = time.perf_counter()
        dist.all_reduce(tensor)
        tensor[0].item()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _conclude(
    store: dist.TCPStore, names: list[str], present: list[int], together: float | None, asked: argparse.Namespace
) -> int:
    """Gather, print, let the others go."""
    reports, missing = [], [names[one] for one in range(len(names)) if one not in present]
    for one in present:
        try:
            store.wait([f"report/{one}"], timedelta(seconds=_PATIENCE * asked.timeout))
            reports.append(NodeReport(**json.loads(store.get(f"report/{one}"))))
        except (dist.DistError, RuntimeError):
            missing.append(names[one])
    store.set("done", "")
    wrong = problems(reports, missing, asked.at_least)
    print(f"preflight: {len(names)} node(s), {_backend()}, all-reduce of {asked.mebibytes:g} MiB")
    print(table(reports))
    if together is not None:
        print(f"all together: {together:.3g} GB/s")
    print("\n".join(wrong) if wrong else "all is well", flush=True)
    (asked.folder / f".preflight-{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}").unlink(missing_ok=True)
    time.sleep(1.0)  # the others still read the store
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a step costs on a slow link: every codec against torch's DDP, on two hosts of this machine.

``python -m benchmarks.wire`` as root; ``--quick`` for a look. Milliseconds are of forward and backward of an MLP with
10.5 M parameters; bytes are what the first host's interface has sent. The last column is the link's utilisation by
the reduction alone, of one tensor of that size, once TCP has found the link's rate, in launches of its own.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import print_table
from benchmarks.network import bytes_sent_here, two_hosts, why_not
from launcher.compression import Wire, attach, preferred_bucket_mib
from launcher.compression.channel import Channel
from launcher.compression.layout import Layout
from launcher.compression.links import Team, reduce_scatter
from launcher.config.schema import Accumulate, Codec, CompressionConfig

RATES = {"1gbit": 1e9, "100mbit": 1e8}
REFERENCE = "torch FP32"
_WIDTH = 1024
_LAYERS = 10
_PORT = 29511
_TIMEOUT_SECONDS = 1500

Arm = Callable[[DistributedDataParallel], None]


def _powersgd(model: DistributedDataParallel) -> None:
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _ours(codec: str, **options: Any) -> Arm:
    return lambda model: (attach(model, codec, **options), None)[1]


CONTESTANTS: dict[str, Arm] = {
    REFERENCE: lambda model: None,
    "torch FP16 hook": lambda model: model.register_comm_hook(None, default_hooks.fp16_compress_hook),
    "torch PowerSGD hook, rank 4, one bucket": _powersgd,
    "fp16, accumulate wire": _ours("fp16", accumulate="wire"),
    "fp16, accumulate fp32": _ours("fp16"),
    "bf16, accumulate fp32": _ours("bf16"),
    "int8, error feedback": _ours("int8"),
    "int8": _ours("int8", error_feedback=False),
    "powersgd, rank 4": _ours("powersgd", start_step=2),
}
ALONE = {
    "fp16, accumulate wire": CompressionConfig(codec=Codec.fp16, accumulate=Accumulate.wire),
    "fp16, accumulate fp32": CompressionConfig(codec=Codec.fp16),
    "bf16, accumulate fp32": CompressionConfig(codec=Codec.bf16),
    "int8, error feedback": CompressionConfig(codec=Codec.int8, error_feedback=True),
    "int8": CompressionConfig(codec=Codec.int8),
}
_TORCH_SHARDED = {"torch, FP32": torch.float32, "torch, FP16": torch.float16, "torch, BF16": torch.bfloat16}
_WARM_UP_STEPS = 3
_ONE_BUCKET_MIB = 1000
"""With more than one, torch's PowerSGD crashes on gloo: its second collectives start in another order on each rank."""


class _Contest:
    """One rank's models, one for each contestant."""

    def __init__(self, names: list[str]) -> None:
        self._inputs = torch.randn(8, _WIDTH)
        self._models = {}
        for name in names:
            layers = [layer for _ in range(_LAYERS) for layer in (nn.Linear(_WIDTH, _WIDTH), nn.ReLU())]
            bucket: float | None = _ONE_BUCKET_MIB if "one bucket" in name else None
            if name in ALONE:  # as a launch has them; torch's contestants have torch's
                bucket = preferred_bucket_mib(ALONE[name].codec, torch.device("cpu"))
            model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=bucket, gradient_as_bucket_view=True)
            CONTESTANTS[name](model)
            self._models[name] = model

    def step(self, name: str) -> None:
        model = self._models[name]
        model.zero_grad(set_to_none=True)
        model(self._inputs).square().mean().backward()

    def measure(self, name: str, steps: int) -> tuple[float, int]:
        """Seconds, and bytes on the interface."""
        return _measured(lambda: self.step(name), steps)


def _measured(step: Callable[[], None], steps: int) -> tuple[float, int]:
    dist.barrier()
    before, started = bytes_sent_here(), time.perf_counter()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - started) / steps, (bytes_sent_here() - before) // steps


def _settled(step: Callable[[], None], rounds: int, steps: int) -> list[tuple[float, int]]:
    """Rounds of steps after those that warm up."""
    _measured(step, _WARM_UP_STEPS)
    return [_measured(step, steps) for _ in range(rounds)]


def _channel(name: str, flat: Tensor) -> tuple[Channel, Wire, Layout]:
    """With errors of the whole tensor, if the codec keeps any."""
    wire = Wire(flat.device)
    channel = Channel(Team(dist.group.WORLD, flat.device), ALONE[name], wire, "benchmark")
    return channel, wire, Layout.of_bucket([("flat", flat.numel())])


def _alone(name: str, flat: Tensor) -> Callable[[], None]:
    """The reduction of one tensor, with no backward pass."""
    channel, wire, layout = _channel(name, flat)

    def step() -> None:
        wire.begin(torch.ones(()))
        channel.run_mean(0, flat, layout)
        wire.conclude(torch.zeros(()))

    return step


def _sharded(name: str, flat: Tensor) -> Callable[[], None]:
    """One reduce-scatter, as FSDP2 makes it: torch's own in 16 bits, or ours."""
    world_size = dist.get_world_size()
    if name in _TORCH_SHARDED:
        source = flat.to(_TORCH_SHARDED[name])
        target = torch.empty(flat.numel() // world_size, dtype=source.dtype)
        return lambda: reduce_scatter(target, source, op=dist.ReduceOp.SUM)
    channel, wire, layout = _channel(name, flat)
    shard = torch.empty(flat.numel() // world_size)

    def step() -> None:
        wire.begin(torch.ones(()))
        channel.run_shard_mean(0, flat, shard, layout)
        wire.conclude(torch.zeros(()))

    return step


Measured = dict[str, dict[str, list[tuple[float, int]]]]
"""By kind and contestant: seconds and bytes of each round."""


def be_rank(
    rank: int, world_size: int, address: str, kind: str, names: list[str], rounds: int, steps: int, out: str
) -> None:
    """One worker's life; rank 0 writes what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{_PORT}", rank=rank, world_size=world_size)
    torch.manual_seed(rank)
    flat = torch.randn(_LAYERS * (_WIDTH * _WIDTH + _WIDTH))
    if kind == "alone":
        found: Measured = {kind: {name: _settled(_alone(name, flat), rounds, steps) for name in names}}
    else:
        whole = flat[: flat.numel() // world_size * world_size]
        found = {"steps": _take_turns(names, rounds, steps)}
        found["sharded"] = {n: _settled(_sharded(n, whole), rounds, steps) for n in (*_TORCH_SHARDED, *ALONE)}
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def _take_turns(names: list[str], rounds: int, steps: int) -> dict[str, list[tuple[float, int]]]:
    """Steps of all contestants, one after another in each round."""
    contest = _Contest(names)
    for name in names:
        contest.measure(name, _WARM_UP_STEPS)
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            measured[name].append(contest.measure(name, steps))
    return measured


def contest(rate: str, ranks_per_host: int, names: list[str], rounds: int, steps: int, launches: int) -> Measured:
    """Everybody's figures on one link; reductions alone in as many launches, since launches differ."""
    found = _launch(rate, ranks_per_host, "steps", names, rounds, steps)
    alone = [name for name in names if name in ALONE]
    found["alone"] = {name: [] for name in alone}
    for _ in range(launches):
        launch = _launch(rate, ranks_per_host, "alone", alone, rounds, steps)["alone"]
        for name in alone:
            found["alone"][name] += launch[name]
    return found


def _launch(rate: str, ranks_per_host: int, kind: str, names: list[str], rounds: int, steps: int) -> Measured:
    with tempfile.TemporaryDirectory() as folder, two_hosts(rate) as hosts:
        out = str(Path(folder) / "measured.json")
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(2 * ranks_per_host):
                request = json.dumps([rank, 2 * ranks_per_host, hosts[0].address, kind, names, rounds, steps, out])
                workers.append(hosts[rank // ranks_per_host].start(["-m", "benchmarks.wire", "--be", request]))
            codes = [worker.wait(_TIMEOUT_SECONDS) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        if any(codes):
            raise RuntimeError(f"workers ended with {codes}")
        found: Measured = json.loads(Path(out).read_text())
        return found


def _rows(found: Measured, names: list[str], rate: str) -> list[list[object]]:
    """Medians of the rounds; ratios within each round."""
    rows: list[list[object]] = []
    reference = found["steps"][REFERENCE]
    for name in names:
        seconds, sent = zip(*found["steps"][name], strict=True)
        ratio = statistics.median(own / base for own, (base, _) in zip(seconds, reference, strict=True))
        bytes_ratio = statistics.median(sent) / statistics.median(base for _, base in reference)
        used = [8 * sent / RATES[rate] / seconds for seconds, sent in found["alone"].get(name, [])]
        utilisation: object = statistics.median(used) if used else "–"
        milliseconds = f"{1e3 * statistics.median(seconds):.0f}"
        rows.append([name, milliseconds, ratio, f"{statistics.median(sent) / 1e6:.1f}", bytes_ratio, utilisation])
    return rows


def _sharded_rows(found: Measured) -> list[list[object]]:
    """Bytes relative to torch's reduce-scatter of the same type (int8: of FP16)."""
    rows: list[list[object]] = []
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)]
        for name, values in found["sharded"].items()
    }
    for name, (seconds, sent) in medians.items():
        reference = "torch, FP32" if "FP32" in name else "torch, BF16" if "bf16" in name else "torch, FP16"
        base_seconds, base_sent = medians[reference]
        rows.append(
            [name, f"{1e3 * seconds:.0f}", seconds / base_seconds, f"{sent / 1e6:.1f}", sent / base_sent, reference]
        )
    return rows


def main() -> None:
    """Print a table for each link and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, the fast link alone")
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS), help="contestants, beside the reference")
    parser.add_argument("--be", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be:
        be_rank(*json.loads(arguments.be))
        return
    reason = why_not()
    if reason:
        raise SystemExit(f"benchmarks.wire: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the hosts are removed then too
    names = [REFERENCE, *(name for name in arguments.only if name != REFERENCE)]
    for rate in list(RATES)[: 1 if arguments.quick else None]:
        for ranks_per_host in (1,) if arguments.quick else (1, 2):
            # At 100 Mbit/s the link decides alone, and takes its time.
            rounds, steps, launches = (3, 5, 1) if arguments.quick else (5, 4, 3) if rate == "1gbit" else (3, 1, 1)
            found = contest(rate, ranks_per_host, names, rounds, steps, launches)
            header = ["", "ms a step", "of torch FP32", "MB sent", "of torch FP32", "link used by the reduction alone"]
            title = f"A step of DDP, {rate}/s between 2 hosts with {ranks_per_host} worker(s) each"
            print_table(title, header, _rows(found, names, rate))
            header = ["", "ms", "relative", "MB sent", "relative", "to"]
            title = f"One reduce-scatter, as under fsdp, {rate}/s, {ranks_per_host} worker(s) on each of 2 hosts"
            print_table(title, header, _sharded_rows(found))


if __name__ == "__main__":
    main()

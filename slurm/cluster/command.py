"""The command line: up, down, status, run, and the faults."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from . import daemons, hosts
from .configuration import HEAD, Options, Places, write_files
from .errors import ClusterError, RequestError
from .packages import check_machine, prepare_machine
from .processes import MARK, daemon_environment, until_gone

__all__ = ["main"]

_DEFAULT_DIRECTORY = "/run/tminus-testcluster"
_LONGEST_SOCKET = 107
"""Bytes in a Unix socket's path."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 failed, 2 wrong request, 3 impossible on this machine."""
    asked = _parser().parse_args(arguments)
    places = Places(Path(asked.directory).resolve())
    try:
        check_machine()
        if asked.verb == "up":
            chosen = {field.name: getattr(asked, field.name) for field in fields(Options)}
            with _alone(places):
                _up(places, Options(**chosen), asked.while_alive)
        elif asked.verb == "down":
            with _alone(places):
                _down(places)
        else:
            return _act(places, asked)
    except ClusterError as error:
        print(f"testcluster: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _act(places: Places, asked: argparse.Namespace) -> int:
    """What needs a cluster that is up."""
    options = places.read_options()
    if options is None or not places.ready.exists() or not hosts.is_alive(places, HEAD):
        raise RequestError(f"there is no cluster up in {places.directory} (testcluster up --directory …)")
    if asked.verb == "status":
        return _status(places, options, as_json=asked.json)
    if asked.verb == "run":
        if asked.on not in (HEAD, *options.names):
            raise RequestError(f"there is no host {asked.on}; there are {', '.join([HEAD, *options.names])}")
        _run(places, asked.on, asked.command[1:] if asked.command[:1] == ["--"] else asked.command)
    if asked.node not in options.names:
        raise RequestError(f"there is no node {asked.node}; there are {', '.join(options.names)}")
    _FAULTS[asked.verb](places, options, asked.node)
    return 0


def _up(places: Places, options: Options, while_alive: int | None) -> None:
    if places.ready.exists() and hosts.is_alive(places, HEAD):
        if places.read_options() != options:
            raise RequestError(f"the cluster in {places.directory} is another: {places.options.read_text()}")
        return
    if len(str(places.munge_socket)) > _LONGEST_SOCKET:
        raise RequestError(f"the path {places.directory} is too long for a socket; choose a shorter --directory")
    prepare_machine()
    _down(places)
    try:
        write_files(places, options)
        if while_alive is not None:
            _end_with(places, while_alive)
        hosts.start_head(places)
        daemons.start_controller(places)
        for node in options.names:
            hosts.add_node(places, options, node)
            daemons.start_slurmd(places, node)
        daemons.wait_until_idle(places, options)
        places.ready.touch()
    except BaseException:
        _down(places)
        raise


def _down(places: Places) -> None:
    left = until_gone(places.directory)
    if left:
        raise ClusterError(f"these processes of the cluster do not end: {left}")
    if places.options.exists():
        shutil.rmtree(places.directory)
    elif places.directory.exists() and any(places.directory.iterdir()):
        raise RequestError(f"{places.directory} is not empty and is not a cluster's")


def _end_with(places: Places, pid: int) -> None:
    """Leave a process behind that takes the cluster down once another has gone."""
    program = Path(sys.argv[0]).resolve()
    words = 'tail --pid="$1" --follow /dev/null; exec "$2" down --directory "$3"'
    subprocess.Popen(
        ["bash", "-c", words, "while-alive", str(pid), str(program), str(places.directory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=daemon_environment(places.directory),
    )


def _status(places: Places, options: Options, *, as_json: bool) -> int:
    states = daemons.node_states(places)
    rows = [
        {
            "node": node,
            "address": options.address(node),
            "state": states.get(node, "?"),
            "power": hosts.is_alive(places, node),
            "slurmd": daemons.slurmd_is_alive(places, node),
            "link": hosts.is_alive(places, node) and hosts.has_link(places, node),
        }
        for node in options.names
    ]
    if as_json:
        print(json.dumps(rows))
        return 0
    print(f"{places.directory}: {options.nodes} node(s) × {options.gpus} GPU(s), links {options.rate or 'unlimited'}")
    for row in rows:
        off = [name for name in ("power", "link", "slurmd") if not row[name]]
        print(f"{row['node']}  {row['address']}  {row['state']:<12}{'  no ' + ', '.join(off) if off else ''}")
    return 0


def _run(places: Places, host: str, command: Sequence[str]) -> None:
    """Become the command, on a host."""
    if not command:
        raise RequestError("run what? testcluster run [--on HOST] -- COMMAND …")
    environment = {**os.environ, "SLURM_CONF": str(places.slurm_conf), MARK: str(places.directory)}
    environment["PATH"] = os.pathsep.join((environment.get("PATH", ""), "/usr/sbin", "/sbin"))
    words = hosts.in_host(places, host, command, folder=os.getcwd())
    sys.stdout.flush()
    os.execvpe(words[0], words, environment)


def _kill_slurmd(places: Places, options: Options, node: str) -> None:
    daemons.kill_slurmd(places, node)


def _restart_slurmd(places: Places, options: Options, node: str) -> None:
    daemons.kill_slurmd(places, node)
    daemons.start_slurmd(places, node)


def _link_down(places: Places, options: Options, node: str) -> None:
    hosts.set_link(places, node, up=False)


def _link_up(places: Places, options: Options, node: str) -> None:
    hosts.set_link(places, node, up=True)


def _power_off(places: Places, options: Options, node: str) -> None:
    if hosts.is_alive(places, node):
        hosts.remove_node(places, node)


def _power_on(places: Places, options: Options, node: str) -> None:
    if not hosts.is_alive(places, node):
        hosts.add_node(places, options, node)
    daemons.start_slurmd(places, node)


_FAULTS = {
    "kill-slurmd": _kill_slurmd,
    "restart-slurmd": _restart_slurmd,
    "link-down": _link_down,
    "link-up": _link_up,
    "power-off": _power_off,
    "power-on": _power_on,
}
_HELP = {
    "kill-slurmd": "SIGKILL to a node's slurmd; its job's processes live on",
    "restart-slurmd": "start a node's slurmd anew",
    "link-down": "pull a node's cable",
    "link-up": "plug it in again",
    "power-off": "end a node and all of its processes without a word to anybody",
    "power-on": "start it again",
}


@contextmanager
def _alone(places: Places) -> Iterator[None]:
    """One up or down at a time, machine-wide: they may install packages."""
    with Path("/run/lock/tminus-testcluster").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="testcluster", description="A real SLURM cluster on this machine.")
    shared = argparse.ArgumentParser(add_help=False)
    directory = os.environ.get(MARK, _DEFAULT_DIRECTORY)
    shared.add_argument("--directory", default=directory, help=f"all of the cluster's files (${MARK}, or %(default)s)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    up = verbs.add_parser("up", parents=[shared], help="start it; nothing to do if it is up")
    default = Options()
    for name in ("nodes", "gpus", "cpus", "memory_mib", "slurmd_timeout_seconds", "requeue_delay_seconds"):
        up.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name), help="%(default)s")
    up.add_argument("--bind-cpus", action="store_true", help="bind tasks to the machine's CPUs")
    up.add_argument("--rate", help="of each link, each way, such as 1gbit; unlimited")
    up.add_argument("--while-alive", type=int, metavar="PID", help="take the cluster down once this process has gone")

    verbs.add_parser("down", parents=[shared], help="end it, and remove all of it")
    status = verbs.add_parser("status", parents=[shared], help="the nodes as SLURM and as the kernel see them")
    status.add_argument("--json", action="store_true")
    run = verbs.add_parser("run", parents=[shared], help="run a command on the head, with SLURM_CONF set")
    run.add_argument("--on", default=HEAD, metavar="HOST", help="a node instead of the head")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …")
    for verb, text in _HELP.items():
        verbs.add_parser(verb, parents=[shared], help=text).add_argument("node")
    return parser

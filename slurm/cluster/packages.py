"""What the machine must have, and Debian's packages that bring it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from .errors import ImpossibleHereError

__all__ = ["check_machine", "prepare_machine"]

_PACKAGE_OF = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}
_SBIN = ("/usr/sbin", "/sbin")
_APT_TIMEOUT_SECONDS = 400


def check_machine() -> None:
    """Raises ImpossibleHereError if nothing could make this machine fit."""
    if sys.platform != "linux":
        raise ImpossibleHereError(f"the test cluster is made of Linux namespaces, and this is {sys.platform}")
    if os.geteuid() != 0:
        raise ImpossibleHereError("the test cluster needs root: it makes network namespaces")


def prepare_machine() -> None:
    """Install what is missing.

    Raises:
        ImpossibleHereError: why there can be no cluster on this machine.
    """
    packages = _missing()
    if packages:
        _install(packages)
    if packages := _missing():
        raise ImpossibleHereError(f"no programs of {', '.join(packages)} even after their installation")
    trial = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"]
    tried = subprocess.run(trial, capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise ImpossibleHereError(f"no namespaces can be made here: {tried.stderr.strip()}")


def _missing() -> list[str]:
    path = os.pathsep.join((os.environ.get("PATH", ""), *_SBIN))
    return sorted({package for program, package in _PACKAGE_OF.items() if shutil.which(program, path=path) is None})


def _install(packages: list[str]) -> None:
    words = " ".join(packages)
    if shutil.which("apt-get") is None:
        raise ImpossibleHereError(f"missing: {words}, and there is no apt-get to install them")
    print(f"testcluster: installing {words}", file=sys.stderr, flush=True)
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in ([*apt, "update"], [*apt, "install", "--yes", "--no-install-recommends", *packages]):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment, timeout=_APT_TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise ImpossibleHereError(f"{' '.join(command)} has not ended in {_APT_TIMEOUT_SECONDS} s") from error
        if done.returncode != 0 and "install" in command:  # of several sources one may be out of reach
            raise ImpossibleHereError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")

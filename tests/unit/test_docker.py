"""The images, as far as they can be checked without a container engine."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from slurm.cluster.configuration import Options, Places, slurm_conf

REPOSITORY = Path(__file__).parents[2]
DOCKER = REPOSITORY / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT", "CMD"}
OF_THE_PLACE = {"SlurmctldHost", "AuthInfo", "StateSaveLocation", "SlurmdSpoolDir", "NodeName", "JobCompType"}
OF_THE_PLACE |= {"SlurmctldPidFile", "SlurmdPidFile", "SlurmctldLogFile", "SlurmdLogFile", "JobCompLoc"}


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def sources(dockerfile: Path) -> list[str]:
    return [word for kind, rest in instructions(dockerfile) if kind == "COPY" for word in shlex.split(rest)[:-1]]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_every_base_is_pinned_and_every_source_exists(dockerfile: Path) -> None:
    assert {kind for kind, _ in instructions(dockerfile)} <= INSTRUCTIONS
    bases = [rest for kind, rest in instructions(dockerfile) if kind == "FROM"]
    assert bases
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+(\.\d+)?-[a-z-]+", base) for base in bases), bases
    for source in sources(dockerfile):
        assert (REPOSITORY / source).exists(), source


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_package_can_be_built_from_what_is_copied(dockerfile: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    needed = {"launcher", "pyproject.toml", "constraints.txt", project["project"]["readme"]}
    assert needed | set(project["tool"]["setuptools"]["package-dir"].values()) <= set(sources(dockerfile))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_run_parses_and_python_packages_are_constrained(dockerfile: Path) -> None:
    for kind, rest in instructions(dockerfile):
        if kind == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
            assert "pip install" not in rest or "-c constraints.txt" in rest


def test_the_hosts_script_parses() -> None:
    subprocess.run(["bash", "-n", str(DOCKER / "host.sh")], check=True)


def test_the_compose_file_has_the_configured_hosts() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"head", "node1", "node2"}
    assert (DOCKER / services["head"]["build"]["context"] / services["head"]["build"]["dockerfile"]).exists()
    for name, service in services.items():
        assert service["hostname"] == name
        assert service["image"] == services["head"]["image"]
        assert service["command"] == (["controller"] if name == "head" else ["node"])


def test_the_containers_cluster_is_set_up_as_the_test_cluster() -> None:
    here = settings((DOCKER / "slurm.conf").read_text())
    there = settings(slurm_conf(Places(Path("/any")), Options()))
    assert here == there


def settings(text: str) -> set[str]:
    """Its lines, comments and what depends on the place aside."""
    lines = (line.strip() for line in text.splitlines() if line and not line.startswith("#"))
    return {line for line in lines if line.partition("=")[0] not in OF_THE_PLACE}

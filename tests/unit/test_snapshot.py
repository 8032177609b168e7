"""A snapshot holds what a project is, uncommitted changes included, and nothing that is ignored."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.clusters.slurm.snapshot import take_snapshot
from launcher.errors import RequestError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "a project"
    for name in ("job.py", "conf/x.yaml", "data/big.bin", "runs/own/1/config.yaml", ".venv/lib.py", "deep/ly/é.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("data/\n")
    (folder / "link.py").symlink_to("job.py")
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def snapshot(project: Path, limit_mib: float = 1.0) -> Path:
    target = project / "runs" / "own" / "1" / "submission" / "0" / "code"
    take_snapshot(project, target, project / "runs", limit_mib)
    return target


PROJECT = {".gitignore", "job.py", "conf/x.yaml", "deep/ly/é.py", "link.py"}


def test_uncommitted_files_are_in_it_and_deleted_ones_are_not(project: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=project, check=True)

    (project / "deleted.py").write_text("")
    git("init", "-q")
    git("add", "-A", "job.py", "deleted.py")
    git("commit", "-qm", "x")
    (project / "job.py").write_text("changed, not committed")
    (project / "deleted.py").unlink()
    copy = snapshot(project)
    assert names(copy) == PROJECT
    assert (copy / "job.py").read_text() == "changed, not committed"
    assert (copy / "link.py").is_symlink()


def test_ignore_rules_hold_outside_of_a_repository_too(project: Path) -> None:
    assert names(snapshot(project)) == PROJECT


def test_a_project_without_git_is_walked(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert names(snapshot(project)) == PROJECT | {"data/big.bin"}


def test_runs_that_were_put_elsewhere_are_not_copied_into_the_next(project: Path) -> None:
    for name in (
        "mine/config.yaml",
        "mine/provenance.json",
        "mine/submission/0/code/job.py",
        "other/.sweeps/x/code/y.py",
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    assert names(snapshot(project)) == PROJECT


def test_a_project_that_is_too_large_is_refused_and_nothing_is_left(project: Path) -> None:
    (project / "weights.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(RequestError) as caught:
        snapshot(project, limit_mib=2)
    for word in ("3 MiB in 6 files", "cluster.snapshot_limit_mib=2", "weights.bin", ".gitignore"):
        assert word in str(caught.value)
    assert not (project / "runs" / "own" / "1" / "submission").exists()


def test_submodules_and_nested_repositories_are_in_it(project: Path) -> None:
    def git(folder: Path, *words: str) -> None:
        settings = ("-c", "user.name=x", "-c", "user.email=x", "-c", "protocol.file.allow=always")
        subprocess.run(["git", *settings, *words], cwd=folder, check=True)

    source, nested = project.parent / "source", project / "nested"
    for folder in (source, nested):
        folder.mkdir()
        (folder / "module.py").write_text("")
        git(folder, "init", "-q")
    git(source, "add", "-A")
    git(source, "commit", "-qm", "x")
    assert names(snapshot(project)) == PROJECT | {"nested/module.py"}
    git(project, "init", "-q")
    git(project, "submodule", "--quiet", "add", str(source), "vendored")
    target = project / "runs" / "own" / "2" / "code"
    take_snapshot(project, target, project / "runs", 1.0)
    assert names(target) == PROJECT | {"nested/module.py", ".gitmodules", "vendored/module.py"}

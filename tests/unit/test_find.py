"""RUN: a path, an id, a beginning of one, or latest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.rundir.find import all_runs, find_run

IDS = ("own/20260101-000000-aaaa", "own/20260101-000000-abbb", "other/20260202-000000-cccc")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three runs, begun in this order; the last by name is not the last by time."""
    for second, name in enumerate((IDS[2], IDS[0], IDS[1])):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        os.utime(folder / "config.yaml", (second, second))
    (tmp_path / "runs" / ".sweeps" / "x").mkdir(parents=True)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (IDS[0], IDS[0]),
        ("20260101-000000-aaaa", IDS[0]),
        ("20260101-000000-ab", IDS[1]),
        ("2026020", IDS[2]),
        ("other", IDS[2]),
        ("latest", IDS[1]),
    ],
)
def test_an_id_or_the_beginning_of_one_is_enough(root: Path, word: str, expected: str) -> None:
    assert find_run(word, root).path == root / expected


def test_a_path_is_a_run_wherever_it_lies(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert find_run("elsewhere", root).path == elsewhere
    assert find_run(f"runs/{IDS[0]}/", root).path == root / IDS[0]


def test_a_whole_id_is_meant_even_if_another_begins_with_it(root: Path) -> None:
    longer = root / "own" / "20260101-000000-aaaa2"
    longer.mkdir()
    (longer / "config.yaml").touch()
    assert find_run("20260101-000000-aaaa", root).path == root / IDS[0]


@pytest.mark.parametrize("word", ["2026", "own", "20260101-000000-a", "own/"])
def test_an_ambiguous_beginning_is_refused_with_the_candidates(root: Path, word: str) -> None:
    with pytest.raises(RunError, match="is the beginning of") as caught:
        find_run(word, root)
    assert IDS[0] in str(caught.value)
    assert IDS[1] in str(caught.value)
    assert (IDS[2] in str(caught.value)) == (word == "2026")


@pytest.mark.parametrize("word", ["nothing", "", "../runs", "0101"])
def test_an_unknown_run_is_refused_with_the_newest(root: Path, word: str) -> None:
    with pytest.raises(RunError, match=r"There is no run|not a run") as caught:
        find_run(word, root)
    if "There is" in str(caught.value):
        assert f"{IDS[1]}, {IDS[0]}, {IDS[2]}" in str(caught.value)


def test_where_there_are_no_runs_it_says_so(tmp_path: Path) -> None:
    assert all_runs(tmp_path / "runs") == []
    with pytest.raises(RunError, match="there are no runs below"):
        find_run("latest", tmp_path / "runs")


def test_a_folder_that_is_no_run_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"it has no config\.yaml"):
        find_run(str(tmp_path), root)


def test_a_run_right_below_the_folder_of_runs_is_one_too(root: Path) -> None:
    (root / "mine" / "submission").mkdir(parents=True)
    (root / "mine" / "config.yaml").touch()
    assert all_runs(root)[-1].path == root / "mine"
    assert find_run("mine", root).path == root / "mine"
    assert len(all_runs(root)) == len(IDS) + 1

"""Only a folder with a valid manifest is a checkpoint, and no byte of one can change unnoticed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.checkpoint import Checkpoint, CheckpointStore, Manifest
from launcher.checkpoint.files import WriteFailedError, writing
from launcher.checkpoint.manifest import DamagedError, FileRecord, _canonical, is_safe_name
from launcher.checkpoint.safety import writable_by_others
from launcher.checkpoint.store import Found
from launcher.config.schema import Verify

FILES = {"__0_0.distcp": b"weights" * 100, "rank-0.pt": b"state" * 10}


def manifest(step: int, **changes: object) -> Manifest:
    values = {"applied_steps": step, "samples": 8 * step, "world_size": 1, "strategy": "ddp", "dtype": "float32"}
    return Manifest(step=step, **{"config_digest": "abc", **values, **changes})  # type: ignore[arg-type]


def save(store: CheckpointStore, step: int, **changes: object) -> Checkpoint:
    partial = store.begin(step)
    records: dict[str, FileRecord] = {}
    for name, content in FILES.items():
        with writing(partial / name, records) as file:
            file.write(content)
    return store.commit(manifest(step, **changes), records)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_there_is_nothing_before_the_first_commit(store: CheckpointStore) -> None:
    assert store.newest_valid(Verify.full).checkpoint is None
    assert store.newest_step() is None
    store.begin(3)
    found = store.newest_valid(Verify.full)
    assert (found.checkpoint, found.passed_over) == (None, ())


def test_a_committed_checkpoint_is_found_with_all_that_was_said_of_it(store: CheckpointStore) -> None:
    save(store, 10)
    save(store, 20, loss_scale={"scale": 1024.0, "growth_tracker": 7}, validation={"loss": 0.25})
    found = store.newest_valid(Verify.full)
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.passed_over) == (20, ())
    assert found.checkpoint.manifest.loss_scale == {"scale": 1024.0, "growth_tracker": 7}
    assert set(found.checkpoint.manifest.files) == set(FILES)
    assert json.loads((found.checkpoint.path / "manifest.json").read_text())["samples"] == 160


def flip(path: Path, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= bit
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped data": (lambda path: flip(path / "__0_0.distcp"), "__0_0.distcp is damaged"),
    "flipped state": (lambda path: flip(path / "rank-0.pt"), "rank-0.pt is damaged"),
    "flipped manifest": (lambda path: flip(path / "manifest.json"), "manifest.json"),
    "truncated": (lambda path: os.truncate(path / "__0_0.distcp", 5), "__0_0.distcp has 5 bytes instead of 700"),
    "missing": (lambda path: (path / "rank-0.pt").unlink(), "rank-0.pt is missing"),
    "extra": (lambda path: (path / "more").write_text("x"), "more does not belong to it"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "a link": (
        lambda path: ((path / "rank-0.pt").rename(path.parent / "kept"), (path / "rank-0.pt").symlink_to("../kept")),
        "rank-0.pt is not a regular file",
    ),
    "another's manifest": (
        lambda path: (path / "manifest.json").write_bytes((path.parent / "step-00000010/manifest.json").read_bytes()),
        "manifest.json is that of step 10",
    ),
    "a pipe for a file": (
        lambda path: ((path / "rank-0.pt").unlink(), os.mkfifo(path / "rank-0.pt")),
        "rank-0.pt is not a regular file",
    ),
    "a pipe for the manifest": (
        lambda path: ((path / "manifest.json").unlink(), os.mkfifo(path / "manifest.json")),
        "manifest.json is not a regular file",
    ),
    "a manifest without end": (
        lambda path: os.truncate(path / "manifest.json", 2**40),
        "manifest.json has 1099511627776 bytes, which none has",
    ),
    "a file for the folder": (
        lambda path: (path.rename(path.with_name("moved")), path.touch()),
        "manifest.json cannot be read (Not a directory)",
    ),
    "a link to a shared folder": (
        lambda path: (
            path.rename(path.with_name("moved")).chmod(0o777),
            path.symlink_to("moved"),
        ),
        "moved can be written by every user",
    ),
    "shared file": (lambda path: (path / "rank-0.pt").chmod(0o666), "rank-0.pt can be written by every user"),
    "shared folder": (lambda path: path.chmod(0o775), "can be written by its group"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_its_reason_and_the_one_before_it_taken(
    store: CheckpointStore, case: str
) -> None:
    damage, words = DAMAGES[case]
    save(store, 10)
    newer = save(store, 20)
    damage(newer.path)
    found = store.newest_valid(Verify.full)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 10
    ((path, problem),) = found.passed_over
    assert path == newer.path
    assert words in str(problem)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "20"),
        ("applied_steps", 10**30),
        ("samples", -1),
        ("samples", True),
        ("world_size", 0),
        ("strategy", 3),
        ("loss_scale", [1]),
        ("loss_scale", {"scale": "x"}),
        ("loss", "x"),
        ("best", float("inf")),
        ("validation", [1, 2]),
        ("validation", {"loss": None}),
        ("validation", {"loss": 10**400}),
        ("aliases", {"a": 5}),
        ("state", None),
        ("created", "now"),
        ("files", []),
        ("files", {"rank-0.pt": {"size": -1, "sha256": ""}}),
        ("files", {"../config.yaml": {"size": 1, "sha256": ""}}),
    ],
    ids=str,
)
def test_a_manifest_of_wrong_types_is_refused_whatever_its_digest(
    store: CheckpointStore, field: str, value: object
) -> None:
    content = json.loads(save(store, 20).manifest.render())
    del content["sha256_of_this_file"]
    content[field] = value
    content["sha256_of_this_file"] = hashlib.sha256(_canonical(content)).hexdigest()
    with pytest.raises(DamagedError, match=field if field != "files" else r"files|rank-0\.pt|config\.yaml"):
        Manifest.parse(_canonical(content))


def test_only_a_steps_own_name_is_that_of_a_checkpoint(store: CheckpointStore) -> None:
    checkpoint = save(store, 20)
    for name in ("step-000000020", "step-20", "step-0000002\u0660", "step-00000020 ", "step-00000020.old"):
        shutil.copytree(checkpoint.path, store.directory / name)
    assert store.candidates() == [checkpoint]


def test_a_checkpoint_that_was_moved_and_linked_to_is_one_and_can_be_pruned(store: CheckpointStore) -> None:
    older = save(store, 10)
    moved = older.path.rename(store.directory.parent / "another disk")
    older.path.symlink_to(moved)
    assert older.problem(Verify.full) is None
    save(store, 20)
    assert store.prune(1, 0, "loss", highest=False) == [older.path]
    assert [path.name for path in store.directory.iterdir()] == ["step-00000020"]
    assert moved.exists()
    save(store, 10)


@pytest.mark.parametrize("target", ["nowhere", "step-00000020"])
def test_a_link_that_leads_nowhere_is_passed_over_and_stays(store: CheckpointStore, target: str) -> None:
    save(store, 10)
    store.path(20).symlink_to(target)
    found = store.newest_valid(Verify.full)
    assert found.checkpoint is not None
    assert found.checkpoint.step == 10
    store.pass_over(found)
    assert store.path(20).is_symlink()


def test_verifying_sizes_reads_no_data_and_so_does_not_see_a_flipped_bit(store: CheckpointStore) -> None:
    checkpoint = save(store, 10)
    flip(checkpoint.path / "__0_0.distcp")
    assert store.newest_valid(Verify.sizes).checkpoint is not None
    assert store.newest_valid(Verify.full).checkpoint is None
    os.truncate(checkpoint.path / "__0_0.distcp", 5)
    assert store.newest_valid(Verify.sizes).checkpoint is None


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_bit_of_a_manifest_can_change_unnoticed(data: st.DataObject) -> None:
    right = manifest(5, files={"a": FileRecord(1, "00")}, loss=0.1, validation={"loss": 1e-3}).render()
    assert Manifest.parse(right).files == {"a": FileRecord(1, "00")}
    changed = bytearray(right)
    changed[data.draw(st.integers(0, len(right) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedError):
        Manifest.parse(bytes(changed))
    with pytest.raises(DamagedError):
        Manifest.parse(right + b" ")


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..", ".", "", "a\0b", "x\n", 3, None])
def test_a_name_that_leads_out_of_the_checkpoint_is_refused(name: object) -> None:
    assert not is_safe_name(name)
    if isinstance(name, str):
        data = manifest(5, files={name: FileRecord(1, "00")}).render()
        with pytest.raises(DamagedError, match="not in the checkpoint's own folder"):
            Manifest.parse(data)


def test_a_shared_folder_is_loaded_if_that_is_asked_for(store: CheckpointStore) -> None:
    checkpoint = save(store, 10)
    for folder in (checkpoint.path, store.directory, store.directory.parent):
        folder.chmod(0o777)
        assert store.newest_valid(Verify.full).checkpoint is None
        assert store.newest_valid(Verify.full, trust_shared=True).checkpoint is not None
        folder.chmod(0o755)
    assert store.newest_valid(Verify.full).checkpoint is not None


def test_what_is_written_under_a_lax_umask_is_still_ones_own(store: CheckpointStore) -> None:
    before = os.umask(0)
    try:
        checkpoint = save(store, 10)
    finally:
        os.umask(before)
    for path in (store.directory, checkpoint.path, *checkpoint.path.iterdir()):
        assert writable_by_others(path) is None


def test_a_commit_replaces_a_checkpoint_that_was_passed_over_and_keeps_it_aside(store: CheckpointStore) -> None:
    flip(save(store, 10).path / "rank-0.pt")
    save(store, 10)
    found = store.newest_valid(Verify.full)
    assert found.checkpoint is not None
    assert found.passed_over == ()
    assert [path.name[:23] for path in store.directory.iterdir() if "aside" in path.name] == ["step-00000010.set-aside"]


def refuse_to_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file server does that has lost its disk for a moment."""
    read = Path.read_bytes

    def failing(asked: Path) -> bytes:
        if asked == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(asked)

    monkeypatch.setattr(Path, "read_bytes", failing)


@pytest.mark.parametrize("case", ["permissions", "a read error"])
def test_what_can_be_mended_is_left_where_it_is_and_neither_counted_nor_removed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    save(store, 10)
    newer = save(store, 30)
    with monkeypatch.context() as patched:
        if case == "permissions":
            (newer.path / "rank-0.pt").chmod(0o664)
        else:
            refuse_to_read(newer.path / "manifest.json", patched)
        found = store.newest_valid(Verify.full)
        assert found.checkpoint is not None
        assert found.checkpoint.step == 10
        store.pass_over(found)
    save(store, 20)
    store.prune(1, 0, "loss", highest=False)
    (newer.path / "rank-0.pt").chmod(0o644)
    assert [checkpoint.step for checkpoint in store.candidates()] == [30, 20]
    assert store.newest_valid(Verify.full) == Found(newer)
    save(store, 30)
    store.prune(1, 0, "loss", highest=False)
    assert [checkpoint.step for checkpoint in store.candidates()] == [30]


def test_what_is_damaged_is_set_aside(store: CheckpointStore) -> None:
    save(store, 10)
    flip(save(store, 20).path / "rank-0.pt")
    store.pass_over(store.newest_valid(Verify.full))
    assert [checkpoint.step for checkpoint in store.candidates()] == [10]
    assert any(path.name.startswith("step-00000020.set-aside") for path in store.directory.iterdir())


def test_a_commit_whose_files_are_not_all_there_is_none(store: CheckpointStore) -> None:
    save(store, 10)
    store.begin(20)
    with pytest.raises(DamagedError, match=r"rank-3\.pt is missing"):
        store.commit(manifest(20), {"rank-3.pt": FileRecord(1, "00")})
    found = store.newest_valid(Verify.full)
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.passed_over) == (10, ())


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteFailedError, match="No such file") as caught, writing(tmp_path / "gone" / "rank-3.pt", {}):
        raise AssertionError("there is no folder for it")
    assert caught.value.path.name == "rank-3.pt"


@pytest.mark.parametrize("size", [100, 3 * 2**20])
def test_a_disk_that_is_full_is_named_as_the_reason(tmp_path: Path, size: int) -> None:
    records: dict[str, FileRecord] = {}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
        with pytest.raises(WriteFailedError, match="File too large"), writing(tmp_path / "x", records) as file:
            file.write(bytes(size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert records == {}


def test_pruning_keeps_the_newest_and_the_best(store: CheckpointStore) -> None:
    for step, loss in ((10, 0.5), (20, 0.1), (30, 0.3), (40, None), (50, 0.4)):
        save(store, step, validation=None if loss is None else {"loss": loss})
    removed = store.prune(keep=1, keep_best=2, metric="loss", highest=False)
    assert [checkpoint.step for checkpoint in store.candidates()] == [50, 30, 20]
    assert sorted(path.name for path in removed) == ["step-00000010", "step-00000040"]
    store.prune(keep=1, keep_best=1, metric="loss", highest=True)
    assert [checkpoint.step for checkpoint in store.candidates()] == [50]
    assert sorted(path.name for path in store.directory.iterdir()) == ["step-00000050"]


def test_cleaning_removes_what_is_half_written_and_nothing_else(store: CheckpointStore) -> None:
    save(store, 10)
    (store.begin(20) / "__0_0.distcp").write_bytes(b"half")
    store.clean()
    assert [path.name for path in store.directory.iterdir()] == ["step-00000010"]


def test_asking_for_the_newest_checkpoint_needs_no_torch() -> None:
    program = "import sys, launcher.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_pruning_keeps_as_many_set_aside_as_checkpoints_and_says_what_it_removes(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30, 40):
        flip(save(store, step).path / "rank-0.pt")
    store.pass_over(store.newest_valid(Verify.full))
    (store.directory / "notes.set-aside-by-hand").mkdir()
    save(store, 50)
    removed = store.prune(keep=2, keep_best=0, metric="loss", highest=False)
    assert [path.name[:13] for path in removed] == ["step-00000020", "step-00000010"]
    assert sorted(path.name.partition(".set-aside")[0] for path in store.directory.iterdir()) == [
        "notes",
        "step-00000030",
        "step-00000040",
        "step-00000050",
    ]
    assert len(caplog.messages) == 2
    assert all("is removed" in message for message in caplog.messages)

"""Reading a checkpoint runs nobody's code, reads nothing outside of it, and gives back what was written."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex

from launcher.checkpoint import Checkpoint, CheckpointStore, Manifest
from launcher.checkpoint.files import file_digest
from launcher.checkpoint.layout import LAYOUT, read_layout
from launcher.checkpoint.loading import read_private, read_tensors, tensor_facts
from launcher.checkpoint.manifest import DamagedError, FileRecord
from launcher.checkpoint.saver import Saved, Saver
from launcher.checkpoint.snapshot import Snapshot, plain, plain_dict
from launcher.checkpoint.weights import load_model_weights
from launcher.config.schema import Verify
from launcher.errors import CheckpointError, JobError

CPU = torch.device("cpu")
RAN: list[str] = []


def run_code(word: str) -> str:
    RAN.append(word)
    return word


class Hostile:
    """Unpickled as the result of a call."""

    def __reduce__(self) -> Any:
        return run_code, ("ran",)


def snapshot(step: int = 3, **tensors: torch.Tensor) -> Snapshot:
    manifest = Manifest(
        step=step, applied_steps=2, samples=24, world_size=1, strategy="ddp", dtype="float32", config_digest="x"
    )
    return Snapshot({f"model.{name}": value for name, value in tensors.items()}, {"random": {"a": [1, "b"]}}, manifest)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def save(store: CheckpointStore, asynchronous: bool = False, **private: Any) -> Checkpoint:
    saver = Saver(store, 0, 1, CPU, asynchronous)
    taken = snapshot(weight=torch.arange(6.0).view(2, 3), half=torch.ones(4, dtype=torch.bfloat16))
    saver.begin(lambda: replace(taken, private={**taken.private, **private}))
    assert isinstance(saver.settle(), Saved)
    (checkpoint,) = store.candidates()
    assert checkpoint.problem(Verify.full) is None
    return checkpoint


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_was_saved_is_read_again(store: CheckpointStore, asynchronous: bool) -> None:
    checkpoint = save(store, asynchronous)
    weights = load_model_weights(checkpoint)
    assert set(weights) == {"weight", "half"}
    assert weights["weight"].equal(torch.arange(6.0).view(2, 3))
    assert weights["half"].dtype == torch.bfloat16
    assert read_private(checkpoint, 0) == {"random": {"a": [1, "b"]}}
    assert tensor_facts(checkpoint)["model.weight"].shape == (2, 3)


def test_plain_dcp_reads_a_checkpoint_too(store: CheckpointStore) -> None:
    state = {"model.weight": torch.zeros(2, 3)}
    checkpoint = save(store)
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, checkpoint_id=checkpoint.path, no_dist=True)
    assert state["model.weight"].equal(torch.arange(6.0).view(2, 3))


def test_an_asynchronous_save_holds_the_values_of_its_own_step(store: CheckpointStore) -> None:
    saver = Saver(store, 0, 1, CPU)
    weight = torch.full((1000, 1000), 1.0)
    saver.prepare(snapshot(weight=weight))
    staged = saver.staged_bytes
    for step in (1, 2):
        saver.begin(partial(snapshot, step, weight=weight))
        weight.add_(1.0)
        assert isinstance(saver.settle(), Saved)
    assert [float(load_model_weights(one)["weight"][0, 0]) for one in store.candidates()] == [2.0, 1.0]
    assert saver.staged_bytes == staged, "one copy, whose memory is used again"
    assert staged < 1.1 * weight.nbytes


def rewrite(checkpoint: Checkpoint, name: str, content: bytes) -> Checkpoint:
    """Replace a file as somebody would who knows how manifests are made."""
    (checkpoint.path / name).write_bytes(content)
    manifest = checkpoint.manifest
    manifest.files[name] = FileRecord(len(content), file_digest(checkpoint.path / name))
    (checkpoint.path / "manifest.json").write_bytes(manifest.render())
    again = Checkpoint(checkpoint.path, checkpoint.step)
    assert again.problem(Verify.full) is None
    return again


@pytest.mark.parametrize("name", [LAYOUT, "rank-0.pt"])
def test_a_hostile_file_runs_no_code(store: CheckpointStore, name: str, tmp_path: Path) -> None:
    RAN.clear()
    hostile = tmp_path / "hostile"
    torch.save({"random": Hostile()}, hostile)
    content = pickle.dumps(Hostile()) if name == LAYOUT else hostile.read_bytes()
    checkpoint = rewrite(save(store), name, content)
    read = load_model_weights if name == LAYOUT else partial(read_private, rank=0)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        read(checkpoint)
    assert RAN == []
    pickle.loads(pickle.dumps(Hostile()))
    assert RAN == ["ran"], "an ordinary unpickler would have run it"


def test_a_file_of_tensors_that_hides_a_call_runs_no_code(store: CheckpointStore, tmp_path: Path) -> None:
    RAN.clear()
    checkpoint = save(store)
    metadata = pickle.loads((checkpoint.path / LAYOUT).read_bytes())
    torch.save(Hostile(), tmp_path / "hostile")
    content = (tmp_path / "hostile").read_bytes()
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(content)
    checkpoint = rewrite(checkpoint, "__0_0.distcp", content)
    checkpoint = rewrite(checkpoint, LAYOUT, pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"cannot be loaded: it holds .*, which no checkpoint needs"):
        load_model_weights(checkpoint)
    assert RAN == []


def changed(change: Callable[[Any], object]) -> Callable[[Metadata], bytes]:
    def apply(metadata: Metadata) -> bytes:
        change(metadata)
        return pickle.dumps(metadata)

    return apply


def first(metadata: Any) -> _StorageInfo:
    place: _StorageInfo = next(iter(metadata.storage_data.values()))
    return place


class Setter:
    """Sets an attribute of a class, as a pickle can."""

    def __reduce__(self) -> Any:
        return Metadata, ({},), (None, {"state_dict_metadata": 3})


LAYOUTS: dict[str, tuple[Callable[[Metadata], bytes], str]] = {
    "another file": (changed(lambda md: setattr(first(md), "relative_path", "../../secret")), "not one of the"),
    "an absolute path": (changed(lambda md: setattr(first(md), "relative_path", "/etc/passwd")), "not one of the"),
    "outside of the file": (changed(lambda md: setattr(first(md), "length", 10**9)), "outside of"),
    "a negative offset": (changed(lambda md: setattr(first(md), "offset", -1)), "outside of"),
    "a transformation": (changed(lambda md: setattr(first(md), "transform_descriptors", ["x"])), "transformation"),
    "pickled bytes": (
        changed(lambda md: md.state_dict_metadata.update(x=BytesStorageMetadata())),
        "BytesStorageMetadata, which no checkpoint needs",
    ),
    "a piece that is not there": (changed(lambda md: md.storage_data.clear()), "does not say where all"),
    "a piece too many": (
        changed(
            lambda md: md.state_dict_metadata["model.half"].chunks.append(
                ChunkStorageMetadata(torch.Size([0]), torch.Size([4]))
            )
        ),
        "not the whole of it",
    ),
    "a piece outside": (
        changed(lambda md: setattr(md.state_dict_metadata["model.half"].chunks[0], "offsets", torch.Size([1]))),
        "not inside of it",
    ),
    "no metadata": (lambda md: pickle.dumps([1, 2]), "something else"),
    "an index": (lambda md: pickle.dumps(MetadataIndex("x", [0])), "something else"),
    "no pickle": (lambda md: b"x" * 100, "not what DCP writes"),
    "an attribute set": (lambda md: pickle.dumps(Setter()), "not what DCP writes|something else"),
    "cut": (lambda md: pickle.dumps(md)[:-20], "not what DCP writes"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_layout_that_is_not_one_is_refused_with_its_reason(store: CheckpointStore, case: str) -> None:
    make, words = LAYOUTS[case]
    checkpoint = save(store)
    content = make(pickle.loads((checkpoint.path / LAYOUT).read_bytes()))
    sizes = {name: record.size for name, record in checkpoint.manifest.files.items()}
    (checkpoint.path / LAYOUT).write_bytes(content)
    with pytest.raises(DamagedError, match=words):
        read_layout(checkpoint.path / LAYOUT, sizes)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model_weights(rewrite(checkpoint, LAYOUT, content))


def test_the_layout_is_read_as_torch_writes_it(store: CheckpointStore) -> None:
    checkpoint = save(store)
    sizes = {name: record.size for name, record in checkpoint.manifest.files.items()}
    ours = read_layout(checkpoint.path / LAYOUT, sizes)
    theirs = pickle.loads((checkpoint.path / LAYOUT).read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def test_a_tensor_of_another_shape_or_name_is_not_read(store: CheckpointStore) -> None:
    checkpoint = save(store)
    with pytest.raises(CheckpointError, match="Size mismatch"):
        read_tensors(checkpoint, {"model.weight": torch.zeros(3, 2)})
    with pytest.raises(CheckpointError, match="Missing key"):
        read_tensors(checkpoint, {"model.bias": torch.zeros(2)})


class Word(str, Enum):
    a = "a"


class OwnTensor(torch.Tensor):
    """What a loader that runs no code does not know."""


REFUSED = [
    {1, 2},
    object(),
    {"a": [Hostile()]},
    {(1, 2): 3},
    {None: 1},
    {Word.a: 1},
    {"a": Word.a},
    {numpy.str_("a"): 1},
    torch.nn.Linear(1, 1),
    torch.ones(2).as_subclass(OwnTensor),
    torch.eye(2).to_sparse(),
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_could_not_be_loaded_safely_is_not_saved(value: Any) -> None:
    with pytest.raises(JobError, match="The job's state"):
        plain(value, "The job's state")


@pytest.mark.parametrize("value", [None, [1], 3, ()], ids=repr)
def test_a_state_that_is_no_dict_is_not_saved(value: Any) -> None:
    with pytest.raises(JobError, match=r"The job's state is a .* instead of a dict"):
        plain_dict(value, "The job's state")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_plain_values_and_tensors_are_saved_whatever_kind_of_dict_holds_them(
    store: CheckpointStore, asynchronous: bool
) -> None:
    job = {
        "a": [1, 2.0, "x", None, True, b"y", (torch.ones(2),)],
        3: defaultdict(int, b=1),
        "4": {"5/6": torch.tensor(1), "5": {"6": torch.tensor(2)}, 5: torch.tensor(3)},
        4: {"5": torch.tensor(4)},
        "weight": torch.nn.Parameter(torch.ones(1)) * 2,
    }
    checkpoint = save(store, asynchronous, job=plain_dict(job, "The job's state"))
    found = read_private(checkpoint, 0)["job"]
    assert type(found[3]) is dict
    assert repr(found) == repr({**job, 3: {"b": 1}, "weight": torch.tensor([2.0])})

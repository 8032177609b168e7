"""A stream that could not be taken up again is refused before anything starts; other data is not built for that."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.session import LAUNCH, Command

Start = Callable[..., Command]
STREAM = ("+experiment=own", "job._target_=stream_job.Streaming")
WORDS = (
    "Streaming.build_dataset('train') returned an IterableDataset (Stateless) without state_dict and load_state_dict, "
    "whose place in the data cannot be restored: return a map-style dataset"
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "launcher")


@pytest.fixture
def streams(project: Path) -> Path:
    shutil.copy(Path(__file__).with_name("stream_job.py"), project)
    return project


@pytest.mark.parametrize("verb", [[], ["check"], ["-m"]], ids=lambda verb: " ".join(["launch", *verb]))
def test_a_stream_without_a_state_is_refused_before_launch(start: Start, streams: Path, verb: list[str]) -> None:
    command = start([*verb, *STREAM], streams)
    assert command.wait() == 2
    assert WORDS in command.errors
    assert command.errors.startswith("launch: ")
    assert "Traceback" not in command.errors
    assert command.output == ""
    assert not list((streams / "runs").glob("own/*"))
    assert (streams / "built").read_text() == "train by rank 0\n"


def test_a_stream_without_a_state_is_refused_without_checkpoints_too(start: Start, streams: Path) -> None:
    command = start([*STREAM, "checkpoint=none"], streams)
    assert command.wait() == 2
    assert WORDS in command.errors
    assert not (streams / "runs").exists()


def test_a_stream_without_a_state_is_refused_under_torchrun(start: Start, streams: Path) -> None:
    command = start(STREAM, streams, TORCHRUN)
    assert command.wait() != 0
    assert WORDS in command.errors
    assert not (streams / "runs").exists()


LATE = """
from own_job import Own


class Late(Own):
    def __init__(self, stream=True, **others):
        super().__init__(**others)
        self.stream = stream

    def build_dataset(self, split):
        if not self.stream or split != "train":
            return super().build_dataset(split)
        {bring}
        return Stateless()
"""

REFUSED_LATE = "Late.build_dataset('train') returned an IterableDataset (Stateless) without state_dict"


@pytest.mark.parametrize("verb", [[], ["check"]], ids=["launch", "check"])
@pytest.mark.parametrize(
    "bring",
    [
        "from stream_job import Stateless",
        "from torch.utils.data import IterableDataset as Base\n        class Stateless(Base):\n"
        "            __iter__ = None",
    ],
    ids=["imported", "defined"],
)
def test_a_stream_that_only_building_the_data_brings_is_refused_before_launch(
    start: Start, streams: Path, verb: list[str], bring: str
) -> None:
    (streams / "late_job.py").write_text(LATE.format(bring=bring))
    command = start([*verb, "+experiment=own", "job._target_=late_job.Late"], streams)
    assert command.wait() == 2
    assert REFUSED_LATE in command.errors
    assert "Traceback" not in command.errors
    assert not (streams / "runs").exists()


def test_a_run_whose_workers_refused_the_stream_is_begun_by_the_same_command_once_that_is_mended(
    start: Start, streams: Path
) -> None:
    """Nothing in the sources hints at it: they name the module in a string."""
    bring = "import importlib\n        Stateless = importlib.import_module('stream_job').Stateless"
    (streams / "late_job.py").write_text(LATE.format(bring=bring))
    late = ["+experiment=own", "job._target_=late_job.Late", "run_dir=mine", "train.max_steps=2"]
    command = start(late, streams)
    assert command.wait() == 2
    assert REFUSED_LATE in command.errors
    assert "Traceback" not in command.errors
    command = start([*late, "+job.stream=false"], streams)
    assert command.wait() == 0, command.errors
    assert json.loads((streams / "mine" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(("target", "times"), [("own_job.Own", 0), ("stream_job.Waiting", 1)])
def test_data_is_built_before_launch_only_where_a_stream_is_known(
    start: Start, streams: Path, target: str, times: int
) -> None:
    source = (streams / "own_job.py").read_text()
    line = '        if self.fail == "dataset":'
    noted = source.replace(line, f'        open("asked", "a").write(split + "\\n")\n{line}')
    (streams / "own_job.py").write_text(noted)
    command = start(["+experiment=own", f"job._target_={target}", "train.max_steps=2"], streams, LAUNCH)
    assert command.wait() == 0, command.errors
    asked = (streams / "asked").read_text().split()
    assert asked.count("validation") == 2, "by each of two workers"
    assert asked.count("train") == 2 + times

"""A stream that only building the data would bring is seen in the sources, and none of them is run for that."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from launcher.config import hints
from launcher.config.hints import hints_at_stream

Write = Callable[[dict[str, str]], dict[str, ModuleType]]
EXPLODES = 'raise SystemExit("imported")\n'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes sources and imports ``hinted_job``; gives what that has imported."""
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def write(sources: dict[str, str]) -> dict[str, ModuleType]:
        for name, source in sources.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        importlib.invalidate_caches()
        importlib.import_module("hinted_job")
        return {name: module for name, module in sys.modules.items() if name not in before}

    for cached in (hints._spec, hints._foreign_folders):
        cached.cache_clear()
    yield write
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


def function(line: str) -> str:
    return f"def build_dataset():\n    {line}\n"


@pytest.mark.parametrize(
    "sources",
    [
        {"hinted_job.py": function("from torch.utils.data import IterableDataset")},
        {"hinted_job.py": "import torch\n" + function("class Late(torch.utils.data.IterableDataset): ...")},
        {"hinted_job.py": function("from torch.utils.data.datapipes.iter import IterableWrapper")},
        {
            "hinted_job.py": function("import late"),
            "late.py": f"{EXPLODES}from torch.utils.data import IterableDataset",
        },
        {
            "hinted_job.py": function("from parts import late"),
            "parts/__init__.py": EXPLODES,
            "parts/late.py": f"{EXPLODES}from .deeper import Late\n",
            "parts/deeper.py": "class Late(data.IterableDataset): ...",
        },
        {
            "hinted_job.py": function("from folder.late import Late"),
            "folder/late.py": "class Late(data.IterableDataset): ...",
        },
        {
            "hinted_job.py": "import own_parts.first\n",
            "own_parts/__init__.py": "",
            "own_parts/first.py": function("from . import second"),
            "own_parts/second.py": "class Late(data.IterableDataset): ...",
        },
    ],
    ids=["named", "defined", "datapipe", "imported", "in-a-package", "in-a-plain-folder", "relative"],
)
def test_a_stream_that_a_function_would_bring_is_seen(project: Write, sources: dict[str, str]) -> None:
    assert hints_at_stream(project(sources))


@pytest.mark.parametrize(
    "sources",
    [
        {"hinted_job.py": "# an IterableDataset is not used here\n" + function("import json, torch, numpy, absent")},
        {"hinted_job.py": function("import other"), "other.py": f"{EXPLODES}from torch.utils.data import Dataset"},
        {"hinted_job.py": function("import broken"), "broken.py": "class (IterableDataset"},
        {"hinted_job.py": function("import one"), "one.py": "import two", "two.py": "import one"},
        {"hinted_job.py": function("import folder"), "folder/data.txt": "class Late(IterableDataset)"},
    ],
    ids=["none", "imported", "broken", "in-a-circle", "a-folder"],
)
def test_a_project_without_streams_hints_at_none(project: Write, sources: dict[str, str]) -> None:
    assert not hints_at_stream(project(sources))

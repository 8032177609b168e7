"""One folder that claims to be a checkpoint: its manifest, and whether what is there is what was written.

Plain Python: nothing here needs torch, other ranks, or the other checkpoints of the run.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launcher.checkpoint.files import file_digest
from launcher.checkpoint.judging import NotNowError, Problem, judging
from launcher.checkpoint.manifest import MANIFEST, MAXIMUM_BYTES, DamagedError, Manifest
from launcher.checkpoint.safety import writable_by_others
from launcher.config.schema import Verify

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder that claims to be a checkpoint."""

    path: Path
    step: int

    @cached_property
    def manifest(self) -> Manifest:
        """Its manifest, read once.

        Raises:
            DamagedError: there is none, or it is not what was written.
        """
        path = self.path / MANIFEST
        try:
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for ever
                raise DamagedError(f"{MANIFEST} is not a regular file")
            if found.st_size > MAXIMUM_BYTES:
                raise DamagedError(f"{MANIFEST} has {found.st_size} bytes, which none has")
            data = path.read_bytes()
        except OSError as error:
            kind = DamagedError if isinstance(error, (FileNotFoundError, NotADirectoryError)) else NotNowError
            raise kind(f"{MANIFEST} cannot be read ({error.strerror})") from error
        manifest = Manifest.parse(data)
        if manifest.step != self.step:
            raise DamagedError(f"{MANIFEST} is that of step {manifest.step}")
        return manifest

    def problem(self, verify: Verify, trust_shared: bool = False) -> Problem | None:
        """Why it must not be loaded; None if it may.

        Args:
            verify: full reads every byte; sizes only looks at which files there are, and how long.
            trust_shared: load what another user could have written.
        """
        with judging() as verdict:
            self.check_entries(trust_shared)
            if verify is Verify.full:
                self.check_digests(self.manifest.files)
        return verdict.problem

    def check_entries(self, trust_shared: bool = False) -> None:
        """Raises DamagedError unless exactly the files of the manifest are there, with their sizes; reads none."""
        if not trust_shared:
            for folder in (self.path, self.path.parent, self.path.parent.parent):  # the run's own, the last
                for each in dict.fromkeys((folder, Path(os.path.realpath(folder)))):  # a link, and what it leads to
                    _refuse_shared(each)
        expected = self.manifest.files
        there = set(os.listdir(self.path)) - {MANIFEST}
        if missing := sorted(set(expected) - there):
            raise DamagedError(f"{missing[0]} is missing{_more(missing)}")
        if extra := sorted(there - set(expected)):
            raise DamagedError(f"{extra[0]} does not belong to it{_more(extra)}")
        for name in [MANIFEST, *sorted(expected)]:
            path = self.path / name
            found = os.lstat(path)
            if not stat.S_ISREG(found.st_mode):
                raise DamagedError(f"{name} is not a regular file")
            if name != MANIFEST and found.st_size != expected[name].size:
                raise DamagedError(f"{name} has {found.st_size} bytes instead of {expected[name].size}")
            if not trust_shared:
                _refuse_shared(path)

    def check_digests(self, names: Iterable[str]) -> None:
        """Raises DamagedError on the first of some files whose content is not what was written."""
        for name in names:
            if file_digest(self.path / name) != self.manifest.files[name].sha256:
                raise DamagedError(f"{name} is damaged: its content is not what was written")


def _refuse_shared(path: Path) -> None:
    reason = writable_by_others(path)
    if reason is not None:
        raise NotNowError(f"{reason}; checkpoint.trust_shared_directory=true loads it all the same")


def _more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""

"""The folder of a run's checkpoints: which there are, which is the newest valid one, and how one becomes one.

``step-00000100.partial/`` is being written, ``step-00000100/`` has been committed by one rename, and
``step-00000100.set-aside-…/`` has been set aside. Plain Python: nothing here needs torch or other ranks.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.checkpoint.files import FOLDER_MODE, remove_tree, sync_folder, writing
from launcher.checkpoint.folder import Checkpoint
from launcher.checkpoint.judging import Problem
from launcher.checkpoint.manifest import MANIFEST, DamagedError, FileRecord, Manifest
from launcher.config.schema import Verify

__all__ = ["CheckpointStore", "Found"]

_log = logging.getLogger(__name__)

_COMMITTED = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")
_PARTIAL = re.compile(r"step-[0-9]{8,}\.partial")
_ASIDE = re.compile(r"step-([0-9]{8,})\.set-aside-[0-9a-f]{4}")


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint, and the newer ones that are not."""

    checkpoint: Checkpoint | None
    passed_over: tuple[tuple[Path, Problem], ...] = ()
    """Newer ones, and why each must not be loaded."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: their folder; it need not exist.
        is_current: False once a later attempt at the run has begun: this one is to write nothing any more.
    """

    def __init__(self, directory: Path, is_current: Callable[[], bool] = lambda: True) -> None:
        self.directory = directory
        self._is_current = is_current
        self._left_alone: set[Path] = set()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is once it is committed."""
        return self.directory / f"step-{step:08d}"

    def partial(self, step: int) -> Path:
        """Where it is while it is written."""
        return self.directory / f"step-{step:08d}.partial"

    def candidates(self) -> list[Checkpoint]:
        """What claims to be a checkpoint, newest first; nothing is verified."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        matches = filter(None, map(_COMMITTED.fullmatch, names))
        found = [Checkpoint(self.directory / match[0], int(match[1])) for match in matches]
        return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)

    def newest_step(self) -> int | None:
        """Of the newest whose manifest can be read; nothing else is verified."""
        for checkpoint in self.candidates():
            try:
                return checkpoint.manifest.step
            except DamagedError:
                continue
        return None

    def newest_valid(self, verify: Verify, trust_shared: bool = False) -> Found:
        """The checkpoint that a run would go on from; see ``Checkpoint.problem`` for the arguments."""
        passed_over: list[tuple[Path, Problem]] = []
        for checkpoint in self.candidates():
            problem = checkpoint.problem(verify, trust_shared)
            if problem is None:
                return Found(checkpoint, tuple(passed_over))
            passed_over.append((checkpoint.path, problem))
        return Found(None, tuple(passed_over))

    def begin(self, step: int) -> Path:
        """A new, empty folder to write into. Raises OSError."""
        self._check_current()
        self.directory.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        partial = self.partial(step)
        remove_tree(partial)
        partial.mkdir(mode=FOLDER_MODE)
        return partial

    def commit(self, manifest: Manifest, files: dict[str, FileRecord]) -> Checkpoint:
        """Make a checkpoint of what has been written and synced: manifest, sync, rename, sync.

        Raises:
            WriteFailedError, OSError, DamagedError: it is none, and the former ones are as they were.
        """
        partial, final = self.partial(manifest.step), self.path(manifest.step)
        manifest = replace(manifest, files=files)
        with writing(partial / MANIFEST, {}) as file:
            file.write(manifest.render())
        Checkpoint(partial, manifest.step).check_entries(trust_shared=True)
        sync_folder(partial)
        self._check_current()
        if final.exists():  # one that was passed over, or the run would not have come here again
            self.set_aside(final)
            self._left_alone.discard(final)
        os.rename(partial, final)
        sync_folder(self.directory)
        return Checkpoint(final, manifest.step)

    def _check_current(self) -> None:
        if not self._is_current():
            reason = "a later attempt at the run has begun; this one is over"
            raise OSError(errno.ESTALE, reason, str(self.directory))

    def discard(self, step: int) -> None:
        """Forget what has been written so far."""
        remove_tree(self.partial(step))

    def set_aside(self, path: Path) -> None:
        """Rename a checkpoint so that it is none any more, and can still be looked at; if that is possible."""
        with suppress(OSError):
            os.rename(path, path.with_name(f"{path.name}.set-aside-{secrets.token_hex(2)}"))

    def pass_over(self, found: Found) -> None:
        """Set aside what is damaged; leave alone, neither counted nor removed, what could not be loaded this time."""
        for path, problem in found.passed_over:
            if problem.is_damage:
                self.set_aside(path)
            else:
                self._left_alone.add(path)

    def clean(self) -> None:
        """Remove what earlier attempts have left half-written or half-removed."""
        if self.directory.exists():
            for name in filter(_PARTIAL.fullmatch, os.listdir(self.directory)):
                remove_tree(self.directory / name)

    def prune(self, keep: int, keep_best: int, metric: str, highest: bool) -> list[Path]:
        """Remove all but the ``keep`` newest and the ``keep_best`` best; returns what was removed.

        The newest one always stays. A checkpoint is renamed before it is removed, so that a crash leaves no
        half of one. Of those that have been set aside the ``keep`` newest stay too: they show what has happened, and
        must not fill the disk.
        """
        candidates = [checkpoint for checkpoint in self.candidates() if checkpoint.path not in self._left_alone]
        kept = {checkpoint.step for checkpoint in candidates[: max(1, keep)]}
        kept.update(_best(candidates, metric, highest)[:keep_best])
        removed = []
        for checkpoint in candidates:
            if checkpoint.step not in kept:
                doomed = self.partial(checkpoint.step)
                remove_tree(doomed)
                os.rename(checkpoint.path, doomed)
                remove_tree(doomed)
                removed.append(checkpoint.path)
        return removed + self._prune_aside(max(1, keep))

    def _prune_aside(self, keep: int) -> list[Path]:
        aside = [(int(match[1]), match[0]) for match in map(_ASIDE.fullmatch, os.listdir(self.directory)) if match]
        removed = [self.directory / name for _, name in sorted(aside, reverse=True)[keep:]]
        for path in removed:
            _log.warning("%s is removed: %d newer ones that were set aside are kept", path, keep)
            remove_tree(path)
        return removed


def _best(candidates: Sequence[Checkpoint], metric: str, highest: bool) -> list[int]:
    """The steps of those that were validated, best first; of equals the earliest."""
    values: list[tuple[float, int]] = []
    for checkpoint in candidates:
        try:
            value = (checkpoint.manifest.validation or {}).get(metric)
        except DamagedError:
            continue
        if isinstance(value, (int, float)) and not math.isnan(value):
            values.append((-value if highest else value, checkpoint.step))
    return [step for _, step in sorted(values)]

"""Every file name in a run directory, and how a new directory gets its name. No other module spells one."""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launcher.errors import ConfigurationError

__all__ = ["RunDirectory"]

_ONLY_OWNER_WRITES = 0o755


@dataclass(frozen=True)
class RunDirectory:
    """The paths in ``runs/<name>/<id>/``, ``<id>`` being ``YYYYmmdd-HHMMSS-<4 hex>`` in local time."""

    path: Path

    @classmethod
    def create(cls, runs_root: Path, name: str, run_dir: str | None = None) -> RunDirectory:
        """Make a directory that did not exist before; two calls in one second get two directories.

        Args:
            runs_root: the folder of all runs.
            name: the run's name; the directory is made in ``runs_root / name``.
            run_dir: the directory itself, if its place was chosen; it must be new or empty.

        Raises:
            ConfigurationError: the directory cannot be made, or ``run_dir`` holds something.
        """
        try:
            if run_dir is not None:
                return cls._create_at(Path(run_dir).absolute())
            parent = runs_root.absolute() / name
            _make_folders(parent)
            while True:
                stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
                path = parent / f"{stamp}-{secrets.token_hex(2)}"
                try:
                    path.mkdir(mode=_ONLY_OWNER_WRITES)
                except FileExistsError:
                    continue
                return cls(path)
        except OSError as error:
            place = f"run_dir={run_dir}" if run_dir is not None else f"runs_root={runs_root}"
            raise ConfigurationError(
                f"{place}: no run directory can be made there ({error.strerror}: {error.filename}). "
                f"Choose a folder that you can write to: {'run_dir' if run_dir is not None else 'runs_root'}=PATH."
            ) from error

    @classmethod
    def _create_at(cls, path: Path) -> RunDirectory:
        _make_folders(path)
        run = cls(path)
        if any(entry not in (run.launcher_lock, run.workers_lock) for entry in path.iterdir()):
            raise ConfigurationError(f"run_dir={path} is not empty: name a new folder, or leave run_dir out.")
        if path.stat().st_uid == os.geteuid():
            path.chmod(path.stat().st_mode & _ONLY_OWNER_WRITES)
        return run

    @property
    def id(self) -> str:
        """The directory's own name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved configuration that the run began with; written once."""
        return self.path / "config.yaml"

    def config_from(self, attempt: int) -> Path:
        """The resolved configuration of ``attempt`` and those after it, if they were resumed with changes."""
        return self.path / f"config-attempt-{attempt}.yaml"

    def configs(self) -> list[Path]:
        """All of them, in the order in which they came into force."""
        changed = [
            (int(found[1]), path)
            for path in self.path.glob("config-attempt-*.yaml")
            if (found := re.fullmatch(r"config-attempt-(\d+)\.yaml", path.name))
        ]
        return [self.config, *(path for _, path in sorted(changed))]

    def config_of(self, attempt: int) -> Path:
        """The configuration that every worker of an attempt loads."""
        in_force = [path for path in self.configs()[1:] if int(path.stem.rpartition("-")[2]) <= attempt]
        return in_force[-1] if in_force else self.config

    @property
    def launcher_lock(self) -> Path:
        """Held by the launching process, whose name is in it; see ``lock``."""
        return self.path / "launcher.lock"

    @property
    def workers_lock(self) -> Path:
        """Shared by the workers."""
        return self.path / "workers.lock"

    @property
    def fence(self) -> Path:
        """Which attempt is the current one, see ``fence``."""
        return self.path / "attempt.json"

    @property
    def cancellation(self) -> Path:
        """That, by whom and how the run is to be cancelled, see ``cancellation``; absent if nobody has asked."""
        return self.path / "cancel.json"

    @property
    def submission(self) -> Path:
        """What was sent to SLURM: a folder for each time."""
        return self.path / "submission"

    def begun_attempts(self) -> list[int]:
        """The numbers of the attempts that have left logs."""
        found = (re.fullmatch(r"attempt-(\d+)", path.name) for path in (self.path / "logs").glob("attempt-*"))
        return sorted(int(match[1]) for match in found if match)

    @property
    def provenance(self) -> Path:
        """Where the run comes from: command line, commit, versions, hosts."""
        return self.path / "provenance.json"

    @property
    def status(self) -> Path:
        """The run's state, see ``status.Status``."""
        return self.path / "status.json"

    @property
    def attempts(self) -> Path:
        """One line per attempt that has ended."""
        return self.path / "attempts.jsonl"

    @property
    def metrics(self) -> Path:
        """One line per event, over all attempts."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints, see ``checkpoint.CheckpointStore``."""
        return self.path / "checkpoints"

    @property
    def result(self) -> Path:
        """What a finished run came to."""
        return self.path / "result.json"

    def attempt_logs(self, attempt: int) -> Path:
        """The folder of one attempt's logs."""
        return self.path / "logs" / f"attempt-{attempt}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        """stdout and stderr of one rank."""
        return self.attempt_logs(attempt) / f"rank-{rank}.log"

    def rank_failure(self, attempt: int, rank: int) -> Path:
        """Why a rank failed, see ``failures.Failure``; absent if it did not."""
        return self.attempt_logs(attempt) / f"rank-{rank}.failure.json"

    def rank_logs(self, attempt: int) -> dict[int, Path]:
        """The logs of the ranks that have begun to write, by rank."""
        logs = self.attempt_logs(attempt).glob("rank-*.log")
        found = ((re.fullmatch(r"rank-(\d+)\.log", path.name), path) for path in logs)
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def agent_log(self, attempt: int, node_rank: int) -> Path:
        """What torch's elastic agent on one node had to say."""
        return self.attempt_logs(attempt) / f"agent-{node_rank}.log"


def _make_folders(path: Path) -> None:
    """``path`` and the folders above it that do not exist; others cannot write into those, whatever the umask."""
    for folder in [*reversed(path.parents), path]:
        if not folder.is_dir():
            folder.mkdir(mode=_ONLY_OWNER_WRITES, exist_ok=True)
